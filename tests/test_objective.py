"""What gin binds as the objective: its switches, its errors, and what the update makes of them."""

import dataclasses
import functools
import inspect
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import advantages as estimators
from jaxrl_stable import corrections, objectives
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.objective import Objective, ObjectiveLike
from jaxrl_stable.trainer import update
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.forward import policy_log_probs


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
        ({"mini_batches": 0}, r"Objective\.mini_batches is 0; use at least 1"),
        ({"kl_weighted": True, "kl_estimator": "k2"}, "kl_weighted makes kl_estimator='k2' biased"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


TIS, ICEPOP = corrections.token_tis, corrections.icepop


@pytest.mark.fast
@pytest.mark.parametrize(
    ("together", "message"),
    [
        ({"corrections": [TIS]}, "minirl and token_tis each weight by the mismatch"),
        ({"corrections": [ICEPOP]}, "minirl and icepop each weight by"),
        ({"corrections": [partial(ICEPOP, weigh=False)]}, None),
        ({"corrections": [corrections.veto, corrections.geometric_mask]}, None),
        ({"loss": partial(objectives.minirl, weight="none"), "corrections": [TIS]}, None),
        ({"loss": objectives.ppo, "corrections": [TIS, ICEPOP]}, "token_tis and icepop each"),
        ({"loss": objectives.vespo, "corrections": [corrections.sequence_tis]}, None),
        (
            {"loss": partial(objectives.vespo, tis_cap=2.0), "corrections": [TIS]},
            "vespo and token_tis each weight by",
        ),
        (
            {"corrections": [corrections.geometric_mask], "policies": "bypass"},
            "policies='bypass' removes the mismatch that geometric_mask needs",
        ),
        ({"loss": objectives.m2po, "policies": "recomputed"}, "mismatch that m2po needs"),
        ({"loss": partial(objectives.m2po, moment="full"), "policies": "recomputed"}, None),
        (
            {"loss": partial(objectives.minirl, weight="mismatch"), "policies": "recomputed"},
            "mismatch that minirl needs",
        ),
        ({"corrections": [corrections.off_policy_sequence_mask], "policies": "bypass"}, None),
    ],
)
def test_functions_that_go_together_and_those_that_do_not(together, message):
    objective = Objective(**together)
    if message is None:
        return objective.check()
    with pytest.raises(ValueError, match=message):
        objective.check()


@pytest.mark.fast
def test_traits_depend_on_the_options_that_are_bound():
    """The innermost default counts unless an outer binding replaces it; wrappers keep it."""
    plain = objectives.traits_of(objectives.minirl)
    assert plain.weighs_mismatch and not plain.needs_mismatch and not plain.whole_batch
    inner = partial(objectives.minirl, weight="none", clip=False)
    assert not objectives.traits_of(inner).weighs_mismatch
    outer = objectives.traits_of(partial(inner, weight="mismatch"))
    assert outer.weighs_mismatch and outer.needs_mismatch
    assert objectives.traits_of(partial(objectives.bapo, form="code")).whole_batch

    @functools.wraps(objectives.minirl)
    def wrapped(*arrays, **options):
        return objectives.minirl(*arrays, **options)

    assert objectives.traits_of(wrapped) == plain
    for function in (objectives.ppo, corrections.off_policy_sequence_mask, wrong_result):
        assert not any(vars(objectives.traits_of(function)).values())


@pytest.mark.fast
def test_a_loss_of_ones_own_declares_its_traits():
    @objectives.traits(whole_batch=True)
    def loss(*arrays):
        return objectives.reinforce(*arrays)

    assert Objective(loss=loss).whole_batch and not Objective().whole_batch


def wrong_result(*arrays):
    return arrays[0]


def wrong_shape(*arrays):
    return 1.0


def broken(*arrays):
    return {}["key"]


@estimators.with_conditions(penalty="separate")
def no_penalty(rewards, group_ids, valid=None, lengths=None):
    return rewards


@pytest.mark.fast
@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(advantages=no_penalty), "no_penalty raised TypeError: .*'penalty'"),
        (Objective(loss=wrong_result), r"wrong_result returns .* instead of TokenLoss"),
        (Objective(corrections=[wrong_shape]), "wrong_shape returns"),
        (Objective(advantages=broken), "broken raised KeyError: 'key'"),
        (Objective(loss=estimators.centered), "centered raised TypeError"),
        (Objective(corrections=[partial(TIS, cap=0.0)], loss=objectives.ppo), "token_tis: cap=0.0"),
        (
            Objective(corrections=[partial(ICEPOP, low=5.0, high=0.5, weigh=False)]),
            "icepop: low=5.0, high=0.5 must bound a ratio",
        ),
        (Objective(loss=partial(objectives.gspo, form="x")), "form 'x' is unknown"),
        (Objective(loss=partial(objectives.minirl, clip_low=1.2)), "clip_low=1.2"),
        (Objective(advantages=partial(estimators.standardized, scale="x")), "scale 'x' is unknown"),
        (Objective(aggregation="seq-mean-token-sum-norm"), "horizon is None"),
    ],
)
def test_check_finds_wrong_options_before_anything_runs(objective, message):
    with pytest.raises(ValueError, match=message):
        objective.check()


@pytest.mark.fast
def test_what_update_needs_is_what_the_protocol_lists():
    used = set(re.findall(r"\bobjective\.(\w+)", inspect.getsource(update)))
    listed = {name for name in vars(ObjectiveLike) if not name.startswith("_")}
    assert used == listed
    assert isinstance(Objective(), ObjectiveLike)
    assert not isinstance(object(), ObjectiveLike)


@pytest.mark.fast
@pytest.mark.parametrize("policies", ["all", "recomputed", "bypass"])
def test_policies_that_the_loss_sees(policies):
    """The corrections see them, too; a wrong order of arguments would show."""
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


# The bounds of BAPO are near 1 here, so that a policy moved by a few percent meets them.
WHOLE = Objective(
    loss=partial(objectives.bapo, low=(0.9, 0.99, 0.01), high=(1.01, 1.2, 0.01), target=0.45),
    corrections=[partial(corrections.normalized_token_tis, cap=1.02)],
)


def gradient(state):
    return [np.asarray(x) for x in jax.tree.leaves(state.opt_state.inner[1][0].mu)]


def test_whole_batch_objectives_do_not_see_micro_batches(
    model, perturbed, quantized_trajectory, advantages, passes
):
    """Micro-batches of 4 rows give the step of all 16; deciding within each would not."""
    whole = WHOLE
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
    """The step with both terms is the step of their sum, by handwritten derivatives."""
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


@pytest.mark.fast
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_weight_of_the_kl_has_a_gradient_without_an_old_policy(estimator):
    """With one update and no pass of `score`, π_old is π_θ: its weight is 1, not missing."""
    rng = np.random.default_rng(0)
    logp, reference = (jnp.asarray(x, jnp.float32) for x in rng.normal(-2, 0.5, (2, 3, 4)))
    mask = jnp.arange(4) < jnp.array([4, 2, 3])[:, None]

    def gradient_of(objective, old):
        batch = types.SimpleNamespace(
            response_mask=mask,
            logp_old=old,
            logp_rollout=logp,
            advantages=jnp.zeros(3),
            logp_reference=reference,
        )
        return jax.grad(lambda x: objective.total(x, jnp.zeros_like(x), batch)[0])(logp)

    plain = Objective(kl_coefficient=0.3, kl_estimator=estimator)
    weighted = dataclasses.replace(plain, kl_weighted=True)
    got = gradient_of(weighted, None)
    np.testing.assert_allclose(got, gradient_of(weighted, logp), rtol=1e-6)
    assert np.abs(got - gradient_of(plain, None)).max() > 0.01
    d = np.where(mask, logp - reference, 0)
    value, slope = {"k1": (d, 1), "k3": (np.exp(-d) - 1 + d, 1 - np.exp(-d))}[estimator]
    np.testing.assert_allclose(got, np.where(mask, 0.3 * (value + slope), 0), rtol=1e-5, atol=1e-6)
