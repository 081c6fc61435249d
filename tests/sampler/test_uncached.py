"""Exact mode, in which sampler and trainer agree bit for bit, and rescored log-probabilities."""

import pathlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import gin_files, train
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.files import read_jsonl
from jaxrl_stable.run.evaluation import Result
from jaxrl_stable.sampler.rollout import Sampling
from jaxrl_stable.sampler.uncached import uncached_rollout

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "experiment.gin")
EXACT = str(ROOT / "experiments" / "exact.gin")
EQUAL_WEIGHTS = {f"weight/{x}" for x in ("raw_mean", "raw_min", "raw_max", "used_max", "ess")}
ZERO = ("kl_", "abs_", "js_", "chi2_", "extreme_", "log_ppl_", "prob_abs_", "prob_diff_")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(*files, **bindings)` returns the training rows of a whole run without a cold start.

    The weights have to move, but an untrained policy is never right: advantages are made up.
    """

    def made_up(rewards, *_):
        return jnp.where(jnp.arange(rewards.size) % 2, 1.0, -1.0)

    nothing = Result(*(np.zeros((1, 1), kind) for kind in (float, int, bool, bool)))
    monkeypatch.setattr(train, "evaluate", lambda *_: nothing)  # it takes another sampler

    def run(*files, **bindings):
        fixed = {"Experiment.cold_start": None, "Reinforcement.steps": 3}
        lines = [f"configs.{name} = {value!r}" for name, value in (fixed | bindings).items()]
        experiment = gin_files.load_experiment([TINY, *files], lines)
        rl = experiment.reinforcement
        rl = replace(rl, objective=replace(rl.objective, advantages=made_up))
        train.train(replace(experiment, reinforcement=rl), tmp_path)
        rows = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "mismatch/prob_pearson" in r]
        assert [row["step"] for row in rows] == [1, 2, 3]
        return rows

    return run


@pytest.mark.parametrize(("replay", "updates"), [("none", 1), ("R3", 2)])
def test_mismatch_is_exactly_zero(run, replay, updates):
    """They agree in every step, while weights move. With ("none", 1) the update measures it."""
    rows = run(EXACT, **{"Objective.replay": replay, "Objective.mini_batches": updates})
    for row in rows:
        distances = [x for x in row if x.startswith(tuple(f"mismatch/{zero}" for zero in ZERO))]
        assert len(distances) > 20
        for name in distances:
            assert row[name] == 0.0, (row["step"], name)
        for name in ("violating_share", "value_error", "gradient_error"):
            assert row[f"validity/mismatch_{name}"] == 0.0, (row["step"], name)
        assert row["routing/agreement"] == 1.0
        assert row["routing/differing_tokens_share"] == 0.0
        assert row["gradient/norm"] > 0
        if updates == 1:
            assert all(row[name] == 1.0 for name in EQUAL_WEIGHTS)
        else:
            assert row["staleness/abs_token_mean"] > 1e-3
            assert row["validity/value_error"] == row["validity/staleness_value_error"] > 0


def test_recomputed_weights_are_one_and_the_mismatch_is_still_measured(run):
    """With one update and no replay, π_θ is π_old, so the importance weight is 1."""
    recomputed = {"Objective.policies": "recomputed"}
    rows = run(**{"Objective.replay": "none", "Objective.mini_batches": 1} | recomputed)
    for row in rows:
        assert all(row[name] == 1.0 for name in EQUAL_WEIGHTS)
        assert row["staleness/abs_token_mean"] == 0.0  # there was a pass of `score`
        assert row["mismatch/kl_k3_token_mean"] > 1e-6 and row["routing/agreement"] < 1
        assert row["validity/mismatch_gradient_error"] > 1e-3
        assert row["validity/gradient_error"] == row["validity/mismatch_gradient_error"]


@pytest.fixture(scope="module")
def uncached(model, prompts, trajectory):
    """The same trajectory, except that its first row has no prompt."""
    tokens, mask = prompts
    mask = mask & (np.arange(len(tokens)) > 0)[:, None]
    sampling = Sampling(trajectory.tokens.shape[1] - tokens.shape[1], stop_ids=(2, 3, 4))
    sample = partial(uncached_rollout, sampling=sampling, micro_batch_size=4)
    return jax.jit(sample)(model, tokens, mask, jax.random.key(1))


def test_same_samples_as_with_the_cache(uncached, trajectory):
    for name in ("tokens", "real", "response_mask", "finished"):
        ours, theirs = getattr(uncached, name), getattr(trajectory, name)
        np.testing.assert_array_equal(ours[1:], theirs[1:], err_msg=name)
        assert not np.asarray(ours[0]).any(), name  # samples nothing
    valid = np.asarray(trajectory.routing.valid)[1:]
    np.testing.assert_array_equal(uncached.routing.valid[1:], valid)
    ours, theirs = (np.asarray(t.routing.experts)[:, 1:] for t in (uncached, trajectory))
    np.testing.assert_array_equal(ours[:, valid], theirs[:, valid])
    np.testing.assert_allclose(uncached.logp_rollout[1:], trajectory.logp_rollout[1:], atol=1e-5)
    assert not np.asarray(uncached.routing.valid[0]).any() and not uncached.logp_rollout[0].any()


@pytest.mark.parametrize("replay", ["none", "R3"])
def test_bits_are_those_of_score_and_only_without_a_cache(
    model, uncached, trajectory, quantized_trajectory, passes, replay
):
    """Three layers, one of them dense. Negative controls: a cache, and int8 weights."""
    worst = {}
    for name, sampled in dict(
        uncached=uncached, cache=trajectory, int8=quantized_trajectory
    ).items():
        scored = passes.scored(model, sampled, jnp.zeros(len(sampled.tokens)), replay)
        worst[name] = float(finalize(scored.metrics)["mismatch/abs_token_max"])
    assert worst["uncached"] == 0.0 < worst["cache"] < 1e-4 < worst["int8"]
