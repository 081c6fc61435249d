"""Rules: which part of which array is placed where. test_meshes.py has whole passes."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxrl_stable import configs
from jaxrl_stable.configs import MeshShape
from jaxrl_stable.sharding import AXES, for_sampling, make_mesh, rows, spec
from jaxrl_stable.sharding.rows import cut_rows, join_rows

pytestmark = pytest.mark.fast

EXPERTS = ("layers", "expert", "embed", "mlp")


def mesh(**sizes: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_partition_of_a_parameter():
    devices = mesh(data=2, fsdp=2, expert=4, tensor=2)
    assert spec(EXPERTS, (3, 8, 32, 16), devices) == P(None, "expert", "fsdp", "tensor")
    # 4 does not divide 6: the experts are whole, and `expert` cuts their rows instead.
    assert spec(EXPERTS, (3, 6, 32, 16), devices) == P(None, None, ("fsdp", "expert"), "tensor")
    assert spec(("embed", "router"), (32, 8), devices) == P(("fsdp", "expert"), None)
    assert spec(("embed", "router"), (2, 8), devices) == P("fsdp", None)
    assert spec(("vocab", "embed"), (7, 32), devices) == P(None, ("fsdp", "expert"))
    assert spec(("layers", "embed"), (3, 32), devices) == P(None, None)  # a vector


def test_weights_are_not_cut_over_a_whole_slice():
    """The last axis is left out, unless it is the only axis of the slice."""
    cube = mesh(data=2, fsdp=4, expert=4, context=4)
    assert spec(("embed", "mlp"), (64, 16), cube) == P(("fsdp", "expert"), None)
    assert spec(EXPERTS[1:], (8, 64, 16), cube) == P("expert", ("fsdp", "context"), None)
    assert spec(("embed", "mlp"), (64, 16), mesh(fsdp=8, expert=2)) == P("fsdp", None)
    assert spec(("embed", "mlp"), (64, 16), mesh(fsdp=64)) == P("fsdp", None)


def test_the_samplers_weights_are_in_place():
    """Experts are spread over fsdp and expert, the rest is whole; values do not change."""
    devices = mesh(fsdp=2, expert=4, tensor=2)
    model = {
        "experts": nnx.Param(jnp.ones((8, 4, 6)), axes=EXPERTS[1:], inputs=("embed",)),
        "query": nnx.Param(jnp.ones((4, 6)), axes=("embed", "heads"), inputs=("embed",)),
        "norm": nnx.Param(jnp.ones(4), axes=("embed",), inputs=None),
    }
    sampler = for_sampling(model)
    partitions = {
        name: spec(param.get_metadata()["axes"], param.get_value().shape, devices)
        for name, param in sampler.items()
    }
    assert partitions["experts"] == P(("fsdp", "expert"), None, "tensor")
    assert partitions["query"] == P(None, "tensor")
    assert sampler["query"].get_metadata()["inputs"] == ("whole_embed",)
    assert sampler["norm"].get_metadata()["inputs"] is None


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match=r"data=3, fsdp=1.* does not fit 1 devices"):
        make_mesh(MeshShape(data=3), jax.devices()[:1])


def test_only_data_crosses_slices():
    devices = [SimpleNamespace(slice_index=i // 2) for i in range(4)]
    with pytest.raises(ValueError, match=r"spans 2 slices; only data may cross .* multiple of 2"):
        make_mesh(MeshShape(data=1, fsdp=4), devices)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 4}, "micro_batch_size is 4; .* multiple of 8"),
        ({"rollout_rows": 8}, "rollout_rows is 8; .* multiple of 16"),
        ({"max_tokens": 31}, "prompt_width . Reinforcement.max_tokens is 95; .* multiple of 2"),
    ],
)
def test_rows_and_columns_must_divide(changes, message):
    experiment = configs.Experiment()
    rl = dict(prompts=8, group_size=8, micro_batch_size=8, max_tokens=32)
    fits = dataclasses.replace(experiment, reinforcement=configs.Reinforcement(**rl))
    devices = mesh(data=2, fsdp=2, expert=2, context=2)
    fits.check_mesh(devices)
    with pytest.raises(ValueError, match=message):
        wrong = configs.Reinforcement(**(rl | changes))
        dataclasses.replace(experiment, reinforcement=wrong).check_mesh(devices)


def test_rows_are_cut_and_joined(monkeypatch):
    """Of 16 rows on 4 devices, part p has row p of each device's run of four."""
    x = jnp.asarray(np.stack([np.arange(16), np.arange(100, 116)])[..., None])
    np.testing.assert_array_equal(cut_rows(x, 4, axis=1)[1, 0, :, 0], [4, 5, 6, 7])
    np.testing.assert_array_equal(join_rows(cut_rows(x, 4, axis=1), axis=1), x)
    monkeypatch.setattr(rows, "_devices", lambda *_: 4)
    np.testing.assert_array_equal(cut_rows(x, 4, axis=1)[1, 0, :, 0], [1, 5, 9, 13])
    np.testing.assert_array_equal(join_rows(cut_rows(x, 4, axis=1), axis=1), x)
