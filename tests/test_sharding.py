"""One program for one device and for a mesh of eight virtual ones."""

import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_stable.configs import MeshShape
from jaxrl_stable.sharding import make_mesh, spec

SCRIPT = """
import dataclasses
from functools import partial
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jaxrl_stable import configs
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.optimizer import init_state, make_optimizer
from jaxrl_stable.rollout import Sampling, rollout
from jaxrl_stable.sharding import make_mesh, shard_rows, sharded_init
from jaxrl_stable.update import make_batch, score, split, update, with_old_policy

config = tiny(vocab_size=32, hidden_size=32, head_dim=8, moe_intermediate_size=16, num_layers=2)
optimizer = make_optimizer(configs.Optimizer(learning_rate=1e-2))
rng = np.random.default_rng(0)
mask = np.arange(6)[None] >= 6 - rng.integers(2, 7, 16)[:, None]
prompts = np.where(mask, rng.integers(4, 32, (16, 6)), 0)
advantages = rng.normal(size=16).astype(np.float32)
passes = dict(micro_batch_size=8, temperature=1.0)
results = []
for sizes in ((1, 1, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)):
    shape = configs.MeshShape(*sizes)
    size = int(np.prod(sizes))
    mesh = make_mesh(shape, jax.devices()[:size])
    with jax.set_mesh(mesh):
        state = sharded_init(mesh, lambda: init_state(init_model(config, 0), optimizer))
        if size > 1:
            gate = state.model.stacks[0][0].mlp.gate[...]
            assert gate.sharding.shard_shape(gate.shape)[1] == config.num_experts // 2
            mu = state.opt_state[1][0].mu.stacks[0][0].mlp.gate[...]
            assert mu.sharding == gate.sharding
        sample = jax.jit(partial(rollout, sampling=Sampling(6, stop_ids=(2, 3))))
        trajectory = sample(state.model, *shard_rows(mesh, (prompts, mask)), jax.random.key(1))
        batch = make_batch(trajectory, shard_rows(mesh, advantages))
        parts = jax.jit(split, static_argnums=1)(batch, 2)
        rows = 8 // (shape.data * shape.fsdp)  # every device has a share of every micro-batch
        assert parts.tokens.sharding.shard_shape(parts.tokens.shape)[:2] == (2, rows)
        experts = parts.routing.experts
        assert experts.sharding.shard_shape(experts.shape)[:3] == (2, 2, rows)
        scored = jax.jit(partial(score, replay="R3", **passes))(state.model, batch)
        batch = with_old_policy(batch, scored)
        objective = configs.Objective(mini_batches=1)
        step = jax.jit(partial(update, objective=objective, optimizer=optimizer, **passes))
        state, metrics = step(state, batch)
        moments = jax.tree.leaves(state.opt_state[1][0].mu)
        results.append(jax.device_get((trajectory.tokens, trajectory.routing, scored.logp_old,
                                       finalize(metrics), moments)))
one = results[0]
for other in results[1:]:
    np.testing.assert_array_equal(one[0], other[0])
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1])):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(one[2], other[2], atol=1e-5)
    for name in one[3]:
        np.testing.assert_allclose(one[3][name], other[3][name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(one[4], other[4]):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(np.abs(a).max(), 1e-3))
print("meshes agree")
"""


def test_meshes_agree_with_one_device():
    """Same sampled tokens, routing, log-probs, metrics and gradients on 1 and on 8 devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip().endswith("meshes agree"), result.stderr


@pytest.mark.fast
def test_partition_of_a_parameter():
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 2), ("data", "fsdp", "expert", "tensor"))
    names = ("layers", "expert", "embed", "mlp")
    assert spec(names, (3, 8, 32, 16), mesh) == P(None, "expert", "fsdp", "tensor")
    assert spec(names, (3, 6, 32, 16), mesh) == P(None, None, "fsdp", "tensor")  # 4 ∤ 6
    assert spec(("embed", "router"), (32, 8), mesh) == P("fsdp", None)


def test_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match=r"data=3, fsdp=1.* does not fit 1 devices"):
        make_mesh(MeshShape(data=3), jax.devices()[:1])
