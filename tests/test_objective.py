"""What gin binds as the objective: its switches, its errors, and what the update makes of them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import advantages as estimators
from jaxrl_stable import corrections, objectives
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.objective import Objective
from jaxrl_stable.update import make_batch, policy_log_probs


@pytest.mark.fast
def test_defaults_are_minirl():
    objective = Objective()
    assert objective.loss is objectives.minirl and objective.advantages is estimators.centered
    assert objective.aggregation == "seq-mean-token-sum" and objective.corrections == ()
    objective.check()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": "two"}, r"Objective\.policies is 'two'; use one of 'all'"),
        ({"aggregation": "mean"}, r"Objective\.aggregation is 'mean'"),
        ({"kl_estimator": "k4"}, r"Objective\.kl_estimator is 'k4'"),
        ({"mini_batches": 0}, r"Objective\.mini_batches is 0; it must be at least 1"),
        ({"corrections": [corrections.token_tis]}, "minirl weighs the mismatch .* count twice"),
        (
            {
                "loss": objectives.ppo,
                "corrections": [corrections.sequence_mis],
                "policies": "bypass",
            },
            r"policies='bypass' makes the mismatch 1 that sequence_mis",
        ),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


@pytest.mark.fast
def test_masks_may_stand_on_minirl():
    Objective(corrections=[corrections.veto, corrections.geometric_mask]).check()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(loss=partial(objectives.gspo, form="x")), "form 'x' is unknown"),
        (Objective(loss=partial(objectives.minirl, clip_low=1.2)), "clip_low=1.2"),
        (Objective(advantages=partial(estimators.standardized, scale="x")), "scale 'x' is unknown"),
        (Objective(aggregation="seq-mean-token-sum-norm"), "horizon is None"),
    ],
    ids=str,
)
def test_check_finds_wrong_options_before_anything_runs(objective, message):
    with pytest.raises(ValueError, match=message):
        objective.check()


@pytest.mark.fast
@pytest.mark.parametrize("policies", ["all", "recomputed", "bypass"])
def test_policies_that_the_loss_sees(policies):
    """And what the corrections see; the order of the arguments is what could be confused."""
    seen = []

    def spy(logp, old, rollout, advantages, mask):
        seen.append((old, rollout))
        return jnp.ones_like(logp)

    def loss(*arrays):
        spy(*arrays)
        return objectives.reinforce(*arrays)

    logp, old, rollout = (jnp.full((1, 3), x) for x in (-1.0, -2.0, -3.0))
    objective = Objective(loss=loss, corrections=[spy], policies=policies)
    objective.token_loss(logp, old, rollout, jnp.ones(1), jnp.ones((1, 3), bool))
    expected = {"all": (old, rollout), "recomputed": (old, old), "bypass": (rollout, rollout)}
    for got in seen:
        for x, y in zip(got, expected[policies], strict=True):
            np.testing.assert_array_equal(x, y)
    assert len(seen) == 2


@pytest.mark.fast
def test_when_the_old_policy_gets_a_pass():
    plain = partial(Objective, mini_batches=1, replay="none")
    assert not plain().needs_score
    for settings in ({"mini_batches": 2}, {"replay": "R3"}, {"replay": "R2"}):
        assert dataclasses.replace(plain(), **settings).needs_score
    assert plain(policies="recomputed").needs_score and plain(policies="bypass").needs_score
    assert plain(policies="recomputed").needs_old_policy
    assert not plain(policies="bypass").needs_old_policy


@pytest.mark.fast
def test_corrections_multiply():
    rng = np.random.default_rng(0)
    logp, old, rollout = rng.normal(-2, 0.5, (3, 4, 6))
    mask = np.arange(6) < np.array([6, 3, 1, 4])[:, None]
    arrays = logp, old, rollout, rng.normal(size=4), mask
    tis, veto = corrections.token_tis, partial(corrections.veto, threshold=0.6)
    out, factor = Objective(loss=objectives.ppo, corrections=[tis, veto]).token_loss(*arrays)
    expected = tis(*arrays) * veto(*arrays)
    assert 0 < (np.asarray(expected)[mask] == 0).mean() < 1
    np.testing.assert_allclose(factor, expected)
    np.testing.assert_allclose(out.loss, objectives.ppo(*arrays).loss * expected, rtol=1e-6)


WHOLE = {
    "m2po": Objective(loss=partial(objectives.m2po, threshold=3e-4, moment="full")),
    "bapo": Objective(
        loss=partial(objectives.bapo, low=(0.9, 0.99, 0.01), high=(1.01, 1.2, 0.01), target=0.45)
    ),
    "normalized": Objective(
        loss=objectives.ppo,
        corrections=[partial(corrections.normalized_token_tis, cap=1.02)],
    ),
}


def gradient(state):
    return [np.asarray(x) for x in jax.tree.leaves(state.opt_state[1][0].mu)]


@pytest.mark.parametrize("name", WHOLE)
def test_whole_batch_objectives_do_not_see_micro_batches(
    name, model, perturbed, quantized_trajectory, advantages, passes
):
    """Micro-batches of 4 rows give the step of all 16, unlike deciding within each of them."""
    whole = WHOLE[name]
    assert whole.whole_batch
    batch = passes.scored_batch(model, quantized_trajectory, advantages)
    (one, metrics), (four, metrics4) = (
        passes.step(passes.init(perturbed), batch, whole, rows) for rows in (16, 4)
    )
    for a, b in zip(gradient(one), gradient(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * np.abs(b).max() + 1e-9)
    ours, theirs = finalize(metrics), finalize(metrics4)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5, err_msg=key)

    class Alone(Objective):
        whole_batch = False

    alone = Alone(**{f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)})
    parted, _ = passes.step(passes.init(perturbed), batch, alone, 4)
    apart = [
        np.abs(a - b).max() / (np.abs(b).max() + 1e-12)
        for a, b in zip(gradient(parted), gradient(one))
    ]
    assert max(apart) > 1e-3


def test_terms_beside_the_loss(model, perturbed, trajectory, advantages, passes):
    """The step with both terms is that of the sum, differentiated by hand-written formulas."""
    objective = Objective(
        loss=objectives.reinforce,
        kl_coefficient=0.3,
        kl_estimator="k2",
        entropy_coefficient=0.2,
        replay="none",
        mini_batches=1,
    )
    reference = passes.scored(model, trajectory, advantages, "none").logp_old
    batch = dataclasses.replace(make_batch(trajectory, advantages), logp_reference=reference)
    state, metrics = passes.step(passes.init(perturbed), batch, objective)

    def expected(m):
        scored, _ = policy_log_probs(m, batch, None, 1.0)
        d = jnp.where(batch.response_mask, scored.logp - reference, 0.0)
        loss = -advantages[:, None] * scored.logp + 0.3 * d**2 / 2 - 0.2 * scored.entropy
        return loss.sum() / len(advantages), (d**2 / 2).sum() / batch.response_mask.sum()

    (loss, kl), grads = jax.jit(jax.value_and_grad(expected, has_aux=True))(perturbed)
    values = finalize(metrics)
    np.testing.assert_allclose(values["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(values["reference/kl"], kl, rtol=1e-5)
    assert kl > 1e-3
    for a, b in zip(gradient(state), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a / 0.1, b, rtol=2e-3, atol=2e-5)
    with pytest.raises(ValueError, match="logp_reference is None"):
        passes.step(passes.init(model), make_batch(trajectory, advantages), objective)
