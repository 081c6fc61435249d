"""Run by test_meshes.py: compares one step on one device with meshes of eight.

python -m tests.sharding.agreement \\
    '[{"mesh": [2, 2, 2, 1, 1]}, {"mesh": [1, 1, 8, 1, 1], "replay": "R2"}]'
"""

import json
import sys
from functools import partial

import jax
import numpy as np

from jaxrl_stable import configs
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.sampler.quantize import sampling_copy
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.sharding import ROWS, make_mesh, shard_rows, sharded_init
from jaxrl_stable.trainer.batch import make_batch, split
from jaxrl_stable.trainer.optimizer import init_state, make_optimizer
from jaxrl_stable.trainer.score import score, with_old_policy
from jaxrl_stable.trainer.supervised import supervised_update
from jaxrl_stable.trainer.update import update

ROW_COUNT, PROMPT, LENGTH = 32, 6, 6
WIDTH = PROMPT + LENGTH
OPTIMIZER = make_optimizer(configs.Optimizer(learning_rate=1e-2, skip_zero_gradients=True))


def results(
    mesh: list[int],
    replay: str,
    format: str,
    lot: int | None = None,
    sft: bool = False,
    **model,
) -> dict[str, object]:
    """Returns tokens, routing, log-probabilities, metrics and first moments of one step."""
    rng = np.random.default_rng(0)
    mask = np.arange(PROMPT)[None] >= PROMPT - rng.integers(2, PROMPT + 1, ROW_COUNT)[:, None]
    prompts = np.where(mask, rng.integers(4, 32, mask.shape), 0)
    advantages = rng.normal(size=ROW_COUNT).astype(np.float32)
    small = dict(vocab_size=32, hidden_size=32, head_dim=8, moe_intermediate_size=16, head_chunk=16)
    config = tiny(**small, **model)
    passes = dict(micro_batch_size=8, temperature=1.0)
    shape = configs.MeshShape(*mesh)
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(mesh))])
    with jax.set_mesh(mesh):
        state = sharded_init(mesh, lambda: init_state(init_model(config, 0), OPTIMIZER))
        sampler = jax.jit(partial(sampling_copy, format=format))(state.model)
        sampling = Sampling(LENGTH, stop_ids=(2, 3))
        sample = jax.jit(partial(rollout, sampling=sampling, at_a_time=lot))
        trajectory = sample(sampler, *shard_rows(mesh, (prompts, mask)), jax.random.key(1))
        batch = make_batch(trajectory, shard_rows(mesh, advantages))
        scored = jax.jit(partial(score, replay=replay, **passes))(state.model, batch)
        batch = with_old_policy(batch, scored)
        mini = jax.jit(split, static_argnums=1)(batch, 2)
        if mesh.size > 1:
            check_places(mesh, state, sampler, trajectory, mini)
        first = jax.tree.map(lambda x: x[0], mini)
        objective = configs.Objective(mini_batches=2, replay=replay)
        step = jax.jit(partial(update, objective=objective, optimizer=OPTIMIZER, **passes))
        state, metrics = step(state, first)
        moments = state.opt_state.inner[1][0].mu
        if mesh.size > 1:
            gate = moments.stacks[0][0].mlp.gate[...]
            assert share(gate) == share(state.model.stacks[0][0].mlp.gate[...])
        supervised = None
        if sft:
            rows = trajectory.real.astype(jax.numpy.int32)
            places = dict(positions=trajectory.routing.valid.cumsum(-1), segment_ids=rows)
            packed = dict(tokens=trajectory.tokens, loss_mask=trajectory.response_mask, **places)
            step = jax.jit(partial(supervised_update, optimizer=OPTIMIZER))
            supervised = finalize(step(state, packed)[1])
        return jax.device_get(
            {
                "supervised": supervised,
                "tokens": trajectory.tokens,
                "routing": trajectory.routing,
                "replayed": batch.routing,
                "logp_rollout": trajectory.logp_rollout,
                "logp_old": scored.logp_old,
                "metrics": finalize(metrics) | finalize(scored.metrics),
                "moments": moments,
            }
        )


def share(x: jax.Array) -> tuple[int, ...]:
    """Returns the shape of what one device holds."""
    return x.sharding.shard_shape(x.shape)


def check_places(mesh, state, sampler, trajectory, mini) -> None:
    """Checks that weights, samples and mini-batches are placed as the rules say."""
    sizes = mesh.shape
    gate, spread = (m.stacks[0][0].mlp.gate.get_value() for m in (state.model, sampler))
    spread = getattr(spread, "values", spread)
    layers, experts, width, inner = gate.shape
    stored = width // (sizes["fsdp"] * sizes["context"])
    assert share(gate) == (layers, experts // sizes["expert"], stored, inner // sizes["tensor"])
    parts = sizes["fsdp"] * sizes["expert"]
    assert share(spread) == (layers, experts // parts, width, inner // sizes["tensor"])
    rows = ROW_COUNT // int(np.prod([sizes[a] for a in ROWS]))
    assert share(trajectory.tokens) == (rows, WIDTH)
    assert share(trajectory.routing.experts)[1:3] == (rows, WIDTH)
    rows, columns = rows * sizes["context"] // 2, WIDTH // sizes["context"]
    assert share(mini.tokens) == (2, rows, columns)
    assert share(mini.routing.experts)[2:4] == (rows, columns)


def main(cases: list[dict]) -> None:
    one = {}
    for case in cases:
        case = {"replay": "R3", "format": "int8"} | case
        key = case["replay"], case["format"], None, case.get("sft", False)
        if key not in one:
            one[key] = results([1, 1, 1, 1, 1], *key)
        expected, actual = one[key], results(**case)
        for name in ("tokens", "routing", "replayed"):
            jax.tree.map(np.testing.assert_array_equal, expected[name], actual[name])
        for name in ("logp_rollout", "logp_old"):
            np.testing.assert_allclose(expected[name], actual[name], atol=1e-5, err_msg=name)
        imbalance = actual["metrics"].get("experts/device_imbalance")
        assert (case["mesh"][2] > 1) == (imbalance is not None)
        for name, value in expected["metrics"].items():
            np.testing.assert_allclose(
                value, actual["metrics"][name], rtol=1e-4, atol=1e-5, err_msg=name
            )
        for name, value in (expected["supervised"] or {}).items():
            np.testing.assert_allclose(value, actual["supervised"][name], rtol=1e-4, err_msg=name)
        worst = 0.0
        for a, b in zip(*(jax.tree.leaves(x["moments"]) for x in (expected, actual))):
            worst = max(worst, np.abs(a - b).max() / np.abs(a).max())
        assert worst < 2e-5, worst
        print(f"{case}: largest difference of a gradient {worst:.1e} of its largest entry")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(json.loads(sys.argv[1]))
