"""Run by test_packing.py: compares packed rows on four devices with padded rows on one.

python -m tests.trainer.packed_on_mesh expected.pickle '[[2, 1, 2, 1, 1]]'

The sizes are those of the axes data, fsdp, expert, tensor and context.
"""

import dataclasses
import json
import pathlib
import pickle
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable.configs import MeshShape
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.routing import Routing
from jaxrl_stable.sharding import make_mesh, shard_rows, state_shardings
from jaxrl_stable.trainer.batch import TrainBatch, split
from jaxrl_stable.trainer.optimizer import init_state
from jaxrl_stable.trainer.packing import joined, pack, plan
from jaxrl_stable.trainer.score import score, with_old_policy
from jaxrl_stable.trainer.update import update
from tests.trainer.test_packing import KEEP, OBJECTIVES, PASSES, SIZE, make_model, make_rows


def placed_rows(mesh) -> TrainBatch:
    rows = make_rows()
    experts = shard_rows(mesh, jnp.moveaxis(rows.routing.experts, 1, 0))
    routing = Routing(jnp.moveaxis(experts, 0, 1), shard_rows(mesh, rows.routing.valid))
    others = shard_rows(mesh, dataclasses.replace(rows, routing=None))
    return dataclasses.replace(others, routing=routing)


def results(sizes: list[int]) -> dict[str, object]:
    mesh, passes = make_mesh(MeshShape(*sizes)), PASSES | {"packed": True}
    with jax.set_mesh(mesh):
        state, batch = init_state(make_model(0.05), KEEP), placed_rows(mesh)
        state = jax.device_put(state, state_shardings(mesh, state))
        model = jax.device_put(make_model(), state_shardings(mesh, state.model))
        scored = jax.jit(partial(score, replay="R2", mini_batches=2, **passes))(model, batch)
        batch = with_old_policy(batch, scored)
        first = jax.jit(lambda batch: jax.tree.map(lambda x: x[0], split(batch, 2)))(batch)
        check_places(first)
        options = dict(objective=OBJECTIVES["R2"], optimizer=KEEP)
        state, metrics = jax.jit(partial(update, **options, **passes))(state, first)
        return jax.device_get((scored, state.opt_state.trace, finalize(metrics)))


def check_places(batch: TrainBatch) -> None:
    """Rows are packed on their own device: only the number of micro-batches is communicated."""

    def there_and_back(batch):
        packing = plan(batch.real, SIZE)
        seen = pack(batch, packing.source)
        back = [joined(x[None], packing) for x in (seen.tokens, seen.routing.valid)]
        return packing, back, joined(seen.routing.experts[None], packing, axis=1)

    program = jax.jit(there_and_back).lower(batch).compile()
    text = program.as_text()
    collectives = re.findall(r"= (\S+) ((?:all|reduce|collective|ragged)-[\w-]+)\(", text)
    assert [kind for _, kind in collectives] == ["all-reduce"], collectives
    assert collectives[0][0].startswith("s32[]"), collectives
    packing, (tokens, valid), experts = program(batch)
    assert packing.used == 1  # of two
    np.testing.assert_array_equal(tokens, np.where(batch.real, batch.tokens, 0))
    np.testing.assert_array_equal(valid, batch.routing.valid)
    real = np.asarray(batch.real)[..., None]
    np.testing.assert_array_equal(experts, np.where(real, batch.routing.experts, 0))


def main(expected: str, meshes: str) -> None:
    logp, experts, gradient, metrics = pickle.loads(pathlib.Path(expected).read_bytes())
    for sizes in json.loads(meshes):
        scored, actual, values = results(sizes)
        np.testing.assert_allclose(logp, scored.logp_old, atol=1e-5)
        valid = scored.routing.valid
        np.testing.assert_array_equal(experts[:, valid], scored.routing.experts[:, valid])
        assert values["packing/columns_share"] == 0.5
        for name in metrics:
            np.testing.assert_allclose(
                metrics[name], values[name], rtol=1e-4, atol=1e-5, err_msg=name
            )
        for a, b in zip(gradient, jax.tree.leaves(actual), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
        print(f"{sizes} agrees")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main(*sys.argv[1:])
