"""Score and update together: the invariants of the method on a real model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import configs
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.routing import Routing
from jaxrl_stable.trainer.batch import make_batch, split
from jaxrl_stable.trainer.forward import policy_log_probs
from tests.negative_controls import shift

LOSS = ("loss", "gradient/norm")


def weights_of(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)]


def assert_same_step(a, b, rtol=2e-5):
    """Checks that loss, gradient norm and weights after the step agree, up to rounding."""
    (state_a, metrics_a), (state_b, metrics_b) = a, b
    for name in LOSS:
        np.testing.assert_allclose(
            finalize(metrics_a)[name], finalize(metrics_b)[name], rtol=rtol, atol=1e-6, err_msg=name
        )
    # Adam's first step is ± the rate: compare the moments, which hold the gradient itself.
    for x, y in zip(moments(state_a), moments(state_b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=2e-6 * max(1e-3, np.abs(x).max()))


def moments(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state.inner[1][0].mu)]


@pytest.fixture(scope="module")
def batch(model, quantized_trajectory, advantages, passes):
    return passes.scored_batch(model, quantized_trajectory, advantages, "R3")


@pytest.fixture(scope="module")
def stepped(perturbed, batch, passes):
    """One update on stale data, in which weights, clip and staleness are all active."""
    state, metrics = passes.step(passes.init(perturbed), batch)
    values = finalize(metrics)
    assert values["clip/high_share"] + values["clip/low_share"] > 0
    assert values["staleness/abs_token_mean"] > 0.01
    assert values["gradient/zero_share"] == 0
    return state, metrics


@pytest.mark.fast
def test_ratio_is_one_right_after_score(model, batch, passes):
    """`score` and `update` agree on the same weights: every run checks this at its start."""
    _, metrics = passes.step(passes.init(model), batch)
    assert finalize(metrics)["staleness/ratio_deviation_max"] <= 1e-5


def assert_same_step_and_metrics(a, b):
    assert_same_step(a, b)
    ours, theirs = finalize(a[1]), finalize(b[1])
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_micro_batches_recut(perturbed, batch, passes, stepped):
    """One micro-batch of all rows gives the same as four micro-batches of four rows."""
    again = passes.step(passes.init(perturbed), batch, micro_batch_size=16)
    assert_same_step_and_metrics(again, stepped)


def take(batch, rows):
    rest = jax.tree.map(lambda x: x[rows], dataclasses.replace(batch, routing=None))
    routing = Routing(batch.routing.experts[:, rows], batch.routing.valid[rows])
    return dataclasses.replace(rest, routing=routing)


def test_rows_permuted(perturbed, batch, passes, stepped):
    order = np.random.default_rng(0).permutation(len(batch.tokens))
    assert_same_step(passes.step(passes.init(perturbed), take(batch, order)), stepped)


def with_padding_rows(batch, count):
    """Adds rows that copy others, but without a real token."""
    rows = np.arange(len(batch.tokens) + count) % len(batch.tokens)
    padded = take(batch, rows)
    real = np.arange(len(rows))[:, None] < len(batch.tokens)
    return dataclasses.replace(
        padded,
        real=padded.real & real,
        response_mask=padded.response_mask & real,
        routing=Routing(padded.routing.experts, padded.routing.valid & real),
    )


def with_padding_columns(batch, count):
    """Adds columns on the right, full of garbage."""
    wide = lambda x, value: np.pad(x, ((0, 0), (0, count)), constant_values=value)  # noqa: E731
    more = (0, 0), (0, 0), (0, count), (0, 0)
    return dataclasses.replace(
        batch,
        tokens=wide(batch.tokens, 5),
        real=wide(batch.real, False),
        response_mask=wide(batch.response_mask, False),
        logp_rollout=wide(batch.logp_rollout, 1e4),
        logp_old=wide(batch.logp_old, -1e4),
        routing=Routing(
            np.pad(batch.routing.experts, more, constant_values=1),
            wide(batch.routing.valid, False),
        ),
    )


def test_padding_rows_and_columns_added(perturbed, batch, passes, stepped):
    """Padding changes no loss, gradient or metric."""
    padded = with_padding_columns(with_padding_rows(batch, 8), 2)
    assert_same_step_and_metrics(passes.step(passes.init(perturbed), padded), stepped)


@pytest.mark.fast
def test_r2_equals_r3_when_sampler_and_trainer_are_one(
    model, perturbed, trajectory, advantages, passes
):
    """With the same program and weights, the trainer records what the sampler used."""
    steps = []
    for replay in ("R2", "R3"):
        batch = passes.scored_batch(model, trajectory, advantages, replay)
        objective = configs.Objective(replay=replay)
        steps.append((batch, *passes.step(passes.init(perturbed), batch, objective)))
    (r2, state2, _), (r3, state3, _) = steps
    valid = np.asarray(r3.routing.valid)
    np.testing.assert_array_equal(
        np.asarray(r2.routing.experts)[:, valid], np.asarray(r3.routing.experts)[:, valid]
    )
    np.testing.assert_array_equal(r2.logp_old, r3.logp_old)
    for a, b in zip(weights_of(state2), weights_of(state3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_r2_and_r3_differ_when_the_sampler_is_quantized(
    model, quantized_trajectory, advantages, passes
):
    r2, r3 = (
        passes.scored(model, quantized_trajectory, advantages, replay) for replay in ("R2", "R3")
    )
    valid = np.asarray(quantized_trajectory.routing.valid)
    a, b = (np.sort(np.asarray(x.routing.experts)[:, valid], -1) for x in (r2, r3))
    assert (a != b).any()
    # The reported disagreement counts exactly these flips (R2 runs on native routing).
    flips = 1 - np.mean([[len(set(x) & set(y)) / len(x) for x, y in zip(*ab)] for ab in zip(a, b)])
    assert 1 - float(finalize(r2.metrics)["routing/agreement"]) == pytest.approx(flips, abs=1e-6)
    differing = (a != b).any(-1).any(0).mean()
    assert float(finalize(r2.metrics)["routing/differing_tokens_share"]) == pytest.approx(differing)
    per_token = np.asarray(r2.differing_layers)[valid]
    np.testing.assert_array_equal(per_token, (a != b).any(-1).sum(0))


def test_r2_is_the_identity_in_the_first_mini_batch(
    model, quantized_trajectory, advantages, passes
):
    """Table 1 of the paper: with unchanged weights R2 replays what the router would choose."""
    steps = []
    for replay in ("none", "R2"):
        batch = passes.scored_batch(model, quantized_trajectory, advantages, replay)
        objective = configs.Objective(replay=replay)
        steps.append(passes.step(passes.init(model), batch, objective))
    assert_same_step(*steps)


def test_r3_with_identical_policies_has_weight_one(model, trajectory, advantages, passes):
    """Invariant d: only rounding is left of the mismatch."""
    scored = passes.scored(model, trajectory, advantages, "R3")
    assert finalize(scored.metrics)["mismatch/abs_token_max"] < 1e-5


def test_r3_lowers_the_mismatch(model, quantized_trajectory, advantages, passes):
    native = passes.scored(model, quantized_trajectory, advantages, "none")
    replayed = passes.scored(model, quantized_trajectory, advantages, "R3")
    name = "mismatch/kl_k3_token_mean"
    assert finalize(replayed.metrics)[name] < finalize(native.metrics)[name]


@pytest.mark.fast
def test_one_token_shift_of_the_routing_is_noticed(model, trajectory, advantages, passes):
    """The negative control: experts attached to the neighbouring token."""
    good = passes.scored(model, trajectory, advantages, "R3")
    shifted = dataclasses.replace(trajectory, routing=shift(trajectory.routing, 1))
    bad = passes.scored(model, shifted, advantages, "R3")
    good_kl, bad_kl = (float(finalize(x.metrics)["mismatch/kl_k3_token_mean"]) for x in (good, bad))
    assert bad_kl > 1e-4 > 1e3 * abs(good_kl)
    assert finalize(bad.metrics)["routing/agreement"] < 0.9


def test_replay_reaches_the_update(perturbed, batch, passes, stepped):
    """Other experts give another gradient: the objective's replay is not ignored."""
    wrong = dataclasses.replace(batch, routing=shift(batch.routing, 1))
    _, metrics = passes.step(passes.init(perturbed), wrong)
    assert abs(finalize(metrics)["loss"] - finalize(stepped[1])["loss"]) > 1e-4
    native = passes.step(passes.init(perturbed), wrong, configs.Objective(replay="none"))[1]
    ignoring = passes.step(passes.init(perturbed), batch, configs.Objective(replay="none"))[1]
    np.testing.assert_array_equal(finalize(native)["loss"], finalize(ignoring)["loss"])


def test_router_has_gradient_under_replay(perturbed, batch, passes):
    state, _ = passes.step(passes.init(perturbed), batch)
    mu = state.opt_state.inner[1][0].mu
    for stack in mu.stacks:
        for block in stack:
            if block.moe:
                assert (jnp.abs(block.mlp.router[...]).sum(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize(
    "objective",
    [configs.Objective(replay="R2", mini_batches=1), configs.Objective(replay="R3")],
    ids=["R2", "several updates"],
)
def test_an_update_that_needs_a_score_pass_says_so(model, batch, passes, objective):
    """Without a score pass, R2 would replay the sampler's experts, and no update would clip."""
    unscored = dataclasses.replace(batch, logp_old=None)
    with pytest.raises(ValueError, match="call score and with_old_policy first"):
        passes.step(passes.init(model), unscored, objective)
    with pytest.raises(ValueError, match="nothing to replay"):
        passes.step(passes.init(model), dataclasses.replace(batch, routing=None), objective)


def test_on_policy_needs_no_score(model, trajectory, advantages, passes):
    """N = 1 without replay: π_old is π_θ; equals the run with a score pass (invariant a)."""
    unscored = make_batch(trajectory, advantages)
    scored = passes.scored_batch(model, trajectory, advantages, "none")
    objective = configs.Objective(replay="none", mini_batches=1)
    assert not objective.needs_score
    steps = [passes.step(passes.init(model), b, objective) for b in (unscored, scored)]
    assert_same_step(*steps)
    mismatch = "mismatch/kl_k1_token_mean"
    assert mismatch in steps[0][1] and mismatch not in steps[1][1]


def test_on_policy_gradient_is_reinforce(model, trajectory, advantages, passes):
    """Invariant a on the model: the gradient of −mean_i Σ_t Â log π."""
    objective = configs.Objective(replay="none", mini_batches=1)
    batch = make_batch(trajectory, advantages)
    state, _ = passes.step(passes.init(model), batch, objective)

    def reinforce(m):
        scored, _ = policy_log_probs(m, batch, None, 1.0)
        return -(advantages[:, None] * scored.logp).sum() / len(advantages)

    expected = jax.jit(jax.grad(reinforce))(model)
    b1 = configs.Optimizer().b1
    for x, y in zip(moments(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x / (1 - b1), y, rtol=2e-3, atol=3e-5)


def test_zero_advantages_change_nothing(model, batch, passes):
    silent = dataclasses.replace(batch, advantages=jnp.zeros_like(batch.advantages))
    state, metrics = passes.step(passes.init(model), silent)
    values = finalize(metrics)
    assert values["gradient/norm"] == 0 and values["gradient/zero_share"] == 1
    for before, after in zip(jax.tree.leaves(model), weights_of(state), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.fast
def test_non_finite_gradient_is_skipped_and_counted(model, batch, passes):
    poisoned = dataclasses.replace(batch, advantages=batch.advantages.at[0].set(jnp.nan))
    state, metrics = passes.step(passes.init(model), poisoned)
    assert not np.isfinite(finalize(metrics)["gradient/norm"])
    for before, after in zip(jax.tree.leaves(model), weights_of(state), strict=True):
        np.testing.assert_array_equal(before, after)
    assert all((m == 0).all() for m in moments(state))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1, 1, 1)
    state, _ = passes.step(state, poisoned)
    assert int(state.skipped_in_a_row) == 2
    state, _ = passes.step(state, batch)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 0)
    assert all(np.isfinite(leaf).all() for leaf in weights_of(state))


def test_length_normalisation_is_a_different_objective(perturbed, batch, passes, stepped):
    objective = configs.Objective(aggregation="seq-mean-token-mean")
    _, metrics = passes.step(passes.init(perturbed), batch, objective)
    assert abs(finalize(metrics)["loss"] - finalize(stepped[1])["loss"]) > 1e-4


def test_split_keeps_rows_together(batch):
    parts = split(batch, 4)
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[i], parts)
        rows = np.arange(4 * i, 4 * i + 4)
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(take(batch, rows)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_experiment_config_errors():
    with pytest.raises(ValueError, match=r"Objective\.replay is 'R1'"):
        configs.Objective(replay="R1")
    with pytest.raises(ValueError, match=r"micro_batch_size \(48\) must divide it"):
        configs.Reinforcement(micro_batch_size=48)
    with pytest.raises(ValueError, match="must be a multiple of Objective"):
        configs.Reinforcement(prompts=30)
