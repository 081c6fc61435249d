"""Packed rows give the same log-probabilities, gradients and metrics as padded rows."""

import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_stable import configs, corrections, objectives
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.objectives import traits_of
from jaxrl_stable.published import PUBLISHED
from jaxrl_stable.routing import Routing
from jaxrl_stable.sharding import MeshShape
from jaxrl_stable.trainer.batch import TrainBatch, split
from jaxrl_stable.trainer.forward import policy_log_probs
from jaxrl_stable.trainer.optimizer import init_state
from jaxrl_stable.trainer.packing import (
    first_fit_decreasing,
    joined,
    pack,
    plan,
    scan_micro_batches,
)
from jaxrl_stable.trainer.score import score, with_old_policy
from jaxrl_stable.trainer.update import update
from tests.negative_controls import shift

ROOT = pathlib.Path(__file__).parents[2]
P, T, SIZE = 7, 16, 4
# (prompt, response) tokens: a full row, rows of one token each, a row without any.
FIRST = (1, 1), (2, 3), (7, 9), (0, 0), (3, 2), (7, 1), (4, 1), (2, 2)  # neighbours fit in a row
SECOND = (7, 9), (1, 9), (7, 8), (3, 4), (6, 5), (2, 1), (5, 7), (1, 1)
PASSES = dict(micro_batch_size=SIZE, temperature=0.9)
KEEP = optax.trace(0.0)  # its state is the gradient
CONFIG = tiny(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe_intermediate_size=12,
    head_chunk=16,
)


def make_model(move=0.0):
    """Draws weights with NumPy, so nothing is compiled. `move` changes every weight a little."""
    rng, moves = np.random.default_rng(0), np.random.default_rng(1)

    def draw(w):
        x = 1 + 0.3 * rng.normal(size=w.shape) if w.ndim < 3 else 0.3 * rng.normal(size=w.shape)
        return jnp.asarray(x * (1 + move * moves.normal(size=w.shape)), w.dtype)

    return jax.tree.map(draw, jax.eval_shape(lambda: init_model(CONFIG, 0)))


def make_rows(lengths=FIRST + SECOND):
    """Returns rows of these lengths, with garbage in their padding."""
    rng = np.random.default_rng(0)
    prompt, response = (np.array(x)[:, None] for x in zip(*lengths))
    columns, shape = np.arange(T), (len(lengths), T)
    real = (columns >= P - prompt) & (columns < P + response)
    mask = real & (columns >= P)
    fed = real & np.roll(real, -1, axis=1)
    logp = np.where(mask, -3 + 0.3 * rng.normal(size=shape), 0.0)
    reference = np.where(mask, logp + 0.1 * rng.normal(size=shape), 0.0)
    chosen = rng.random((CONFIG.num_moe_layers, *shape, CONFIG.num_experts)).argsort(-1)
    experts = chosen[..., : CONFIG.num_experts_per_token].astype(np.uint8)
    return TrainBatch(
        tokens=jnp.asarray(rng.integers(4, CONFIG.vocab_size, shape), jnp.int32),
        real=jnp.asarray(real),
        response_mask=jnp.asarray(mask),
        logp_rollout=jnp.asarray(logp, jnp.float32),
        advantages=jnp.asarray(rng.normal(size=len(lengths)), jnp.float32),
        routing=Routing(jnp.asarray(experts), jnp.asarray(fed)),
        logp_old=None,
        logp_reference=jnp.asarray(reference, jnp.float32),
        prompt_width=P,
    )


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def run(model, rows):
    """`run(objective, packed, weights)` returns scores, gradients and metrics of all updates."""

    @cache
    def scored(replay, parts, packed):
        options = dict(packed=packed, mini_batches=parts if packed else 1)
        return jax.jit(partial(score, replay=replay, **PASSES, **options))(model, rows)

    @partial(jax.jit, static_argnames=("objective", "packed"))
    def step(weights, batch, objective, packed):
        state = init_state(weights, KEEP)
        options = dict(objective=objective, optimizer=KEEP, packed=packed)
        state, metrics = update(state, batch, **options, **PASSES)
        return state.opt_state.trace, finalize(metrics)

    def of(objective, packed, weights):
        batch, before = rows, None
        if objective.mini_batches > 1:
            before = scored(objective.replay, objective.mini_batches, packed)
            batch = with_old_policy(batch, before)
        parts = split(batch, objective.mini_batches)
        take = lambda i: jax.tree.map(lambda x: x[i], parts)  # noqa: E731
        return before, [
            step(weights, take(i), objective, packed) for i in range(objective.mini_batches)
        ]

    return of


SEQUENCE = configs.Objective(
    mini_batches=1,
    loss=objectives.gspo,
    aggregation="seq-mean-token-mean",
    kl_coefficient=0.1,
)
TWO_PASSES = dict(corrections=(corrections.normalized_sequence_tis,))
OBJECTIVES = {
    "R2": configs.Objective(replay="R2", mini_batches=2, entropy_coefficient=0.1),
    "R3, whole batch, no score": dataclasses.replace(SEQUENCE, **TWO_PASSES),
}
MORE = {
    "R3": configs.Objective(replay="R3", mini_batches=2),
    "none": configs.Objective(replay="none", mini_batches=2),
    "none, no score": configs.Objective(replay="none", mini_batches=1),
    "sequence": dataclasses.replace(SEQUENCE, mini_batches=2),
    "whole batch": configs.Objective(
        mini_batches=2, loss=objectives.bapo, aggregation="token-mean"
    ),
}
CASES = [pytest.param(v, id=k) for k, v in OBJECTIVES.items()] + [
    pytest.param(v, id=k, marks=pytest.mark.slow) for k, v in MORE.items()
]


@pytest.mark.parametrize("objective", CASES)
def test_packed_rows_give_the_same(objective, run, rows):
    """Compares π_old, recorded routes, gradients and metrics of every update on stale weights."""
    stale = make_model(move=0.05)
    (padded_score, padded), (packed_score, packed) = (
        run(objective, packed, stale) for packed in (False, True)
    )
    if packed_score is not None:
        np.testing.assert_allclose(padded_score.logp_old, packed_score.logp_old, atol=1e-5)
        assert (np.asarray(packed_score.logp_old) != 0).sum() == rows.response_mask.sum()
        differing = padded_score.differing_layers, packed_score.differing_layers
        np.testing.assert_array_equal(*differing)
        valid = np.asarray(padded_score.routing.valid)
        np.testing.assert_array_equal(valid, packed_score.routing.valid)
        experts = (np.asarray(s.routing.experts)[:, valid] for s in (padded_score, packed_score))
        np.testing.assert_array_equal(*experts)
        assert_same_metrics(*(finalize(s.metrics) for s in (padded_score, packed_score)))
    for (expected, metrics), (actual, packed_metrics) in zip(padded, packed, strict=True):
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1e-6)
        new = {"packing/fill", "packing/columns_share"}
        assert set(packed_metrics) == set(metrics) | new
        assert_same_metrics(metrics, packed_metrics)
    if objective.mini_batches == 2:  # 44 tokens need 3 rows, 77 tokens 6: one micro-batch, then two
        shares = [float(metrics["packing/columns_share"]) for _, metrics in packed]
        assert shares == [0.5, 1.0]
        fill = [float(metrics["packing/fill"]) for _, metrics in packed]
        tokens = [sum(map(sum, part)) for part in (FIRST, SECOND)]
        np.testing.assert_allclose(fill, [tokens[0] / 64, tokens[1] / 128], rtol=1e-6)


def assert_same_metrics(expected, actual):
    for name in expected:
        np.testing.assert_allclose(expected[name], actual[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_ratio_is_one_right_after_score(run, model):
    """Rows are packed in `score` as in the first update."""
    _, steps = run(OBJECTIVES["R2"], True, model)
    assert steps[0][1]["staleness/ratio_deviation_max"] <= 1e-5


@pytest.mark.fast
def test_score_packs_the_rows_that_an_update_packs(model, rows, monkeypatch):
    """Other neighbours would change the rounding, and flip close choices of a router."""
    packed = []
    monkeypatch.setattr(
        "jaxrl_stable.trainer.score.plan",
        lambda real, size: packed.append(real.shape) or plan(real, size),
    )
    options = dict(replay="none", packed=True, mini_batches=2, **PASSES)
    jax.eval_shape(partial(score, **options), model, rows)
    assert set(packed) == {(len(FIRST), T)}


@pytest.mark.fast
def test_first_fit_decreasing():
    """By hand: 9 | 7 3 | 5 4 1 in rows of ten; zeros take no room."""
    row, start = jax.jit(first_fit_decreasing, static_argnums=1)(
        jnp.array([4, 9, 1, 0, 7, 5, 3]), 10
    )
    np.testing.assert_array_equal(row, [2, 0, 0, 0, 1, 2, 1])
    np.testing.assert_array_equal(start[jnp.array([0, 1, 2, 4, 5, 6])], [5, 0, 9, 0, 0, 7])


@pytest.fixture(scope="module")
def packed_rows():
    """Returns rows that fit into one micro-batch, and what the model sees of them."""
    rows = make_rows(FIRST)
    packing = jax.jit(plan, static_argnums=1)(rows.real, SIZE)
    return rows, packing, jax.jit(pack)(rows, packing.source[:SIZE])


@pytest.mark.fast
def test_segments_are_whole_rows(packed_rows):
    """Every token appears once; prompt and response adjoin, with positions from 0 and own ids."""
    rows, packing, seen = packed_rows
    assert packing.used == 1
    found = {}
    for r in range(SIZE):
        for segment in set(np.asarray(seen.segment_ids[r]).tolist()) - {0}:
            columns = np.flatnonzero(seen.segment_ids[r] == segment)
            np.testing.assert_array_equal(columns, columns[0] + np.arange(len(columns)))
            np.testing.assert_array_equal(seen.positions[r, columns], np.arange(len(columns)))
            experts = seen.routing.experts[:, r, columns]
            others = seen.tokens, seen.response_mask, seen.routing.valid
            found[segment - 1] = [*(x[r, columns] for x in others), experts]
    assert sorted(found) == [i for i, row in enumerate(FIRST) if sum(row)]
    for i, parts in found.items():
        expected = rows.tokens[i], rows.response_mask[i], rows.routing.valid[i]
        for a, b in zip((*expected, rows.routing.experts[:, i]), parts, strict=True):
            np.testing.assert_array_equal(np.compress(rows.real[i], a, axis=b.ndim // 3), b)


@pytest.mark.fast
def test_what_is_packed_amiss_is_noticed(packed_rows, model):
    """Negative controls: boundaries, positions or routes off by one token, routes not packed."""
    rows, packing, seen = packed_rows
    forward = jax.jit(lambda seen: policy_log_probs(model, seen, seen.routing, 1.0)[0].logp)
    expected = np.asarray(forward(rows))

    def error(seen, target=packing.target):
        at = dataclasses.replace(packing, target=target)
        return np.abs(np.asarray(joined(forward(seen)[None], at)) - expected).max()

    assert error(seen) < 1e-5
    replace = partial(dataclasses.replace, seen)
    off_by_one = {
        "segments": replace(segment_ids=jnp.roll(seen.segment_ids, 1, axis=1)),
        "one segment": replace(segment_ids=(seen.segment_ids > 0).astype(jnp.int32)),
        "positions": replace(positions=jnp.roll(seen.positions, 1, axis=1)),
        "routing": replace(routing=shift(seen.routing, 1)),
        "routing not packed": replace(
            routing=Routing(rows.routing.experts[:, :SIZE], rows.routing.valid[:SIZE])
        ),
    }
    for name, wrong in off_by_one.items():
        assert error(wrong) > 1e-3, name
    assert error(seen, packing.target + 1) > 1e-3


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_rows_of_other_micro_batches_add_nothing(name, rows):
    """The loss of all rows is the sum of losses with some responses taken out."""
    published, mask = PUBLISHED[name], rows.response_mask
    functions = published.token_loss, *published.corrections
    if any(traits_of(function).whole_batch for function in functions):
        pytest.skip("decides on all rows together")
    old = rows.logp_rollout + 0.1 * jnp.sin(jnp.arange(T))

    def total(logp, mask):
        return published(logp, old, rows.logp_rollout, rows.advantages, mask, horizon=9.0)

    def parts(logp):
        chosen = [jnp.arange(len(mask)) % 3 == i for i in range(3)]
        found = [total(logp, mask & rows_of[:, None]) for rows_of in chosen]
        return sum(x for x, _ in found), sum(n for _, n in found)

    logp = rows.logp_reference
    (whole, count), gradient = jax.value_and_grad(total, has_aux=True)(logp, mask)
    (summed, counts), gradients = jax.value_and_grad(parts, has_aux=True)(logp)
    assert count == counts
    np.testing.assert_allclose(whole, summed, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
def test_empty_micro_batches_do_not_run(rows):
    """The step is called with rows that have tokens; otherwise its result is 0."""

    def step(count, micro):
        seen, rows = micro.seen, micro.rows
        return count + 1, (seen.real.sum(), seen.response_mask.sum(), rows.response_mask.sum())

    def run(rows):
        return scan_micro_batches(step, 0, rows, SIZE, plan(rows.real, SIZE))

    count, (tokens, seen, looked_at) = jax.jit(run)(rows)
    assert count == 2 and tokens.sum() == rows.real.sum()
    np.testing.assert_array_equal(tokens > 0, [True, True, False, False])
    np.testing.assert_array_equal(seen, looked_at)


@pytest.fixture
def on_meshes(run, tmp_path):
    """Packed R2 on four devices gives the same, and packing moves nothing between devices."""
    scored, [(gradient, metrics), _] = run(OBJECTIVES["R2"], False, make_model(move=0.05))
    arrays = scored.logp_old, scored.routing.experts, jax.tree.leaves(gradient), metrics
    expected = tmp_path / "expected.pickle"
    expected.write_bytes(pickle.dumps(jax.device_get(arrays)))

    def compare(*meshes):
        module = "tests.trainer.packed_on_mesh"
        command = [sys.executable, "-m", module, str(expected), str(list(meshes))]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("agrees") == len(meshes)

    return compare


def test_mesh_agrees_with_padded_rows_on_one_device(on_meshes):
    on_meshes([2, 1, 2, 1, 1])


@pytest.mark.slow
def test_more_meshes_agree_with_padded_rows_on_one_device(on_meshes):
    on_meshes([1, 2, 1, 2, 1], [1, 4, 1, 1, 1])


@pytest.mark.fast
def test_what_cannot_be_packed_is_refused():
    packed = configs.Reinforcement(packed=True)
    with pytest.raises(ValueError, match="rollout_cache = False samples in padded rows"):
        dataclasses.replace(packed, rollout_cache=False)
    with pytest.raises(ValueError, match=r"MeshShape\.context is 2; set it to 1"):
        configs.Experiment(reinforcement=packed, mesh=MeshShape(context=2))
    mesh = jax.sharding.AbstractMesh(
        (1, 1, 1, 1, 2), ("data", "fsdp", "expert", "tensor", "context")
    )
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="on one device"):
        jax.eval_shape(partial(plan, micro_batch_size=4), jax.ShapeDtypeStruct((4, 8), bool))
