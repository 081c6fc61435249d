"""Bugs that other systems had with importance weights, masks and rows; each test names where.

The whole list, with the tests in other files, is in test_bug_catalogue.py.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import configs
from jaxrl_stable.advantages import centered
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.model import token_log_probs
from jaxrl_stable.objectives import aggregate, minirl
from jaxrl_stable.rewards import Reward, Verdict
from jaxrl_stable.routing import Routing
from jaxrl_stable.run.gates import check_finite, check_first_mini_batch
from jaxrl_stable.run.judge import judge
from jaxrl_stable.run.programs import make_programs
from jaxrl_stable.run.task import Task
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.forward import policy_log_probs
from jaxrl_stable.trainer.score import score, with_old_policy
from tests.run.test_judge import Words

GATE = configs.Reinforcement().gate("float32")


def moments(state):
    return jax.tree.leaves(state.opt_state.inner[1][0].mu)


def assert_same_step(one, other):
    """Checks that all metrics and the gradient (the first moments) are equal, up to rounding."""
    (state, metrics), (state2, metrics2) = one, other
    ours, theirs = finalize(metrics), finalize(metrics2)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(moments(state), moments(state2), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * max(1e-3, np.abs(b).max()))


@pytest.mark.fast
def test_golden_weights_are_of_tokens_and_of_the_current_policy():
    """Three tokens whose π_θ/μ_old is 2, 1/2 and 4, one response.

    trl#5814: a sequence weight used the sum of log-ratios (4), not their mean (4^⅓ = 1.587).
    unsloth-zoo#870: the sum of exps (6.5), not the exp of the sum (4). MiniRL uses neither: each
    token has its own. slime#179: with π_old = 3 μ_old the old policy would give 3 for all.
    """
    rollout = jnp.log(jnp.array([[0.1, 0.2, 0.05]]))
    logp, old = rollout + jnp.log(jnp.array([[2.0, 0.5, 4.0]])), rollout + jnp.log(3.0)
    mask, advantages = jnp.ones((1, 3), bool), jnp.array([0.5])
    run = partial(minirl, clip=False)
    out = run(logp, old, rollout, advantages, mask)
    np.testing.assert_allclose(out.weight, [[2.0, 0.5, 4.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: aggregate(run(x, old, rollout, advantages, mask).loss, mask)[0])
    np.testing.assert_allclose(gradient(logp), [[-1.0, -0.25, -2.0]], rtol=1e-6)
    old_only = run(logp, old, rollout, advantages, mask, weight="mismatch")
    np.testing.assert_allclose(old_only.weight, [[3.0, 3.0, 3.0]], rtol=1e-6)
    # Length enters in one place, by name: each weight is a third if the mean over tokens is chosen.
    total, count = aggregate(out.loss, mask, "seq-mean-token-mean")
    np.testing.assert_allclose(total / count, jnp.sum(out.loss) / 3, rtol=1e-6)


@pytest.mark.fast
def test_the_fused_loss_has_the_weights_of_the_plain_one(model, config):
    """Liger-Kernel#1088: the fused loss left the weights out; gradients were 100 times as large."""
    B, T = 4, 9
    assert config.head_chunk < B * T  # several chunks
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, config.hidden_size)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, config.vocab_size, (B, T)))
    mask = jnp.asarray(np.arange(T) < np.array([9, 5, 7, 1])[:, None])
    advantages = jnp.asarray([0.7, -0.3, 0.5, -0.9])
    options = dict(clip_low=0.2, clip_high=0.27, truncation=5.0)

    @jax.jit
    def plain_logp(weight, hidden):
        z = jax.nn.log_softmax(hidden @ weight / 0.8)
        return jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]

    logp = np.asarray(plain_logp(model.head_weight(), hidden), np.float64)
    old = logp - rng.normal(scale=0.3, size=(B, T))
    sampler = old - rng.normal(loc=2.0, scale=1.0, size=(B, T))  # weights from 1/2 to the cap
    w = np.minimum(np.exp(logp - sampler), options["truncation"])
    a, ratio = np.asarray(advantages, np.float64)[:, None], np.exp(logp - old)
    silent = ((a > 0) & (ratio > 1.27)) | ((a < 0) & (ratio < 0.8))
    coefficient = np.where(np.asarray(mask) & ~silent, w * a, 0.0) / B
    assert 0 < silent[mask].sum() < mask.sum() and 0 < (w[mask] == 5).sum() < mask.sum()

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def fused(model, hidden):
        scored = token_log_probs(model, hidden, targets, 0.8)
        inputs = jnp.asarray(old, jnp.float32), jnp.asarray(sampler, jnp.float32)
        out = minirl(scored.logp, *inputs, advantages, mask, **options)
        total, count = aggregate(out.loss, mask)
        return total / count

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def plain(weight, hidden):
        return -jnp.sum(jnp.asarray(coefficient, jnp.float32) * plain_logp(weight, hidden))

    by_model, by_hidden = fused(model, hidden)
    by_weight, expected = plain(model.head_weight(), hidden)
    np.testing.assert_allclose(by_hidden, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_model.embedding[...].T, by_weight, rtol=1e-4, atol=1e-6)


def test_temperature_on_one_side_is_stopped(model, trajectory, advantages, passes):
    """trl#4159: ratios near 2 "on-policy", because only one side divided by the temperature."""
    cold = jax.jit(partial(score, replay="R3", micro_batch_size=4, temperature=0.7))
    batch = make_batch(trajectory, advantages)
    scored = cold(model, batch)
    _, metrics = passes.step(passes.init(model), with_old_policy(batch, scored))
    with pytest.raises(RuntimeError, match=r"score and update disagree.*temperature"):
        check_first_mini_batch(metrics, GATE, 1)
    # The sampler's side shows in the mismatch: the rollout was at 1.
    assert finalize(scored.metrics)["mismatch/abs_token_mean"] > 0.05
    good = passes.scored_batch(model, trajectory, advantages)
    check_first_mini_batch(passes.step(passes.init(model), good)[1], GATE, 1)


@pytest.mark.fast
def test_score_and_update_are_bound_to_the_same_settings():
    """verl#6280, trl#4159: other micro-batches or temperature made "on-policy" ratios ≠ 1."""
    rl = configs.Reinforcement(micro_batch_size=16, temperature=0.6)
    programs = make_programs(rl, Sampling(rl.max_tokens, rl.temperature))
    bound = [program.__wrapped__.keywords for program in (programs.score, programs.update)]
    for keywords in bound:
        assert keywords["micro_batch_size"] == 16 and keywords["temperature"] == 0.6
    assert bound[0]["replay"] == bound[1]["objective"].replay == "R3"
    assert programs.rollout.__wrapped__.keywords["sampling"].temperature == 0.6


def test_truncated_sampling_records_the_log_probs_of_the_trainer(model, prompts):
    """trl#6789: under top-p the sampler's renormalised log-probs were mixed with plain ones."""
    sampling = Sampling(3, temperature=0.7, top_p=0.5, stop_ids=(2,))
    run = jax.jit(partial(rollout, sampling=sampling))(model, *prompts, jax.random.key(0))
    batch = make_batch(run, jnp.zeros(len(run.tokens)))
    scored, _ = jax.jit(partial(policy_log_probs, replay=None, temperature=0.7))(model, batch)
    np.testing.assert_allclose(run.logp_rollout, scored.logp, atol=1e-4)


@pytest.mark.fast
def test_log_probs_that_the_sampler_could_not_give(perturbed, trajectory, advantages, passes):
    """trl#6166: NaN for some tokens is harmless in padding; elsewhere the step is skipped."""
    batch = passes.scored_batch(perturbed, trajectory, advantages)
    state = passes.init(perturbed)
    expected = passes.step(state, batch)

    def with_value(where, value):
        spoiled = jnp.where(where, value, batch.logp_rollout)
        return dataclasses.replace(batch, logp_rollout=spoiled)

    for value in (np.nan, np.inf):
        padded = passes.step(state, with_value(~batch.response_mask, value))
        for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    row = int(jnp.argmax(jnp.abs(advantages)))
    one = jnp.zeros_like(batch.response_mask).at[row, batch.prompt_width].set(True)
    assert batch.response_mask[row, batch.prompt_width]
    after, metrics = passes.step(state, with_value(one, np.nan))
    assert not np.isfinite(finalize(metrics)["gradient/norm"])
    assert int(after.skipped_in_a_row) == 1
    for a, b in zip(jax.tree.leaves(after.model), jax.tree.leaves(perturbed), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(RuntimeError, match="the last 1 gradients were non-finite"):
        check_finite(after, 1)


def test_missing_log_probs_are_refused(model, trajectory, advantages, passes):
    """trl#6166: None for all tokens must not be read as "on-policy"."""
    batch = passes.scored_batch(model, trajectory, advantages)
    errors = (AttributeError, TypeError, ValueError)
    with pytest.raises(errors):
        minirl(batch.logp_old, batch.logp_old, None, advantages, batch.response_mask)
    with pytest.raises(errors):
        passes.step(passes.init(model), dataclasses.replace(batch, logp_rollout=None))


@pytest.fixture(scope="module")
def whole_step(model, perturbed, passes):
    """Runs from a rollout to the updated weights; the reward depends on problem and response."""

    def reward(problems, responses):
        pairs = zip(problems, responses, strict=True)
        return [Verdict(float(sum(map(ord, r)) % 2 == p["id"] % 2), "ok") for p, r in pairs]

    task = Task([], [], Words(), Reward("parity", reward))

    def run(trajectory, problems, groups):
        judged = judge(task, problems, trajectory)
        advantages = centered(jnp.asarray(judged.rewards), jnp.asarray(groups), judged.valid)
        scored = passes.scored(model, trajectory, advantages)
        batch = with_old_policy(make_batch(trajectory, advantages), scored)
        return judged, batch, passes.step(passes.init(perturbed), batch)

    return run


@pytest.mark.fast
def test_rows_of_a_whole_step_permuted(trajectory, whole_step):
    """verl#2185, verl#1943, JustRL#5: re-sorted rows silently got the rewards of other rows."""
    rows = len(trajectory.tokens)
    problems, groups = [{"id": i // 4} for i in range(rows)], np.arange(rows) // 4
    judged, batch, stepped = whole_step(trajectory, problems, groups)
    assert 0.2 < judged.rewards.mean() < 0.8
    order = np.random.default_rng(0).permutation(rows)
    routing = trajectory.routing
    others = dataclasses.replace(trajectory, routing=None)
    moved = dataclasses.replace(
        jax.tree.map(lambda x: x[order], others),
        routing=Routing(routing.experts[:, order], routing.valid[order]),
    )
    judged2, batch2, stepped2 = whole_step(moved, [problems[i] for i in order], groups[order])
    np.testing.assert_array_equal(judged2.rewards, judged.rewards[order])
    np.testing.assert_allclose(batch2.advantages, batch.advantages[order], atol=1e-6)
    np.testing.assert_allclose(batch2.logp_old, batch.logp_old[order], atol=1e-5)
    assert_same_step(stepped2, stepped)  # the metrics, including entropy, cover all rows
    # Control: problems in the old order get the rewards of other rows.
    wrong, _, stepped3 = whole_step(moved, problems, groups)
    assert np.any(wrong.rewards != judged.rewards[order])
    assert abs(finalize(stepped3[1])["loss"] - finalize(stepped[1])["loss"]) > 1e-3
