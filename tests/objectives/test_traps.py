"""Mistakes that other systems made or invite: denominators, overflow, and meanings of bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import corrections, objectives
from jaxrl_stable.advantages import (
    centered,
    clip_filter,
    gpg,
    leave_one_out,
    maxrl,
    reinforce_plus_plus,
    standardized,
)
from jaxrl_stable.objectives import aggregate, divide
from tests.objectives.derivations import FACTORS, GRADIENTS
from tests.objectives.inputs import SEEDS, B, Inputs, T, make_batches, make_inputs, stack, to_jax

MODE = "seq-mean-token-mean"


def gradients(name, batches, mode=MODE, **options):
    """Returns (gradient, TokenLoss, count) of a list of inputs, in float32."""

    def loss(logp, *rest):
        out = getattr(objectives, name)(logp, *rest, **options)
        total, count = aggregate(out.loss, rest[-1], mode)
        return divide(total, count), (out, count)

    arrays = to_jax(stack(batches), jnp.float32)
    gradient, (out, count) = jax.vmap(jax.grad(loss, has_aux=True))(*arrays)
    return np.asarray(gradient), out, count


def one_token(ratio, advantage, mismatch=1.0):
    """Returns a batch of one response token with p/p_old = ratio, p_old/p_rollout = mismatch."""
    old, mask = np.full((B, T), -3.0), np.zeros((B, T), bool)
    mask[0, 0] = True
    logp, rollout = old + np.log(ratio), old - np.log(mismatch)
    return Inputs(logp, old, rollout, np.full(B, advantage), mask)


def slopes(name, *tokens, **options):
    """Returns dL/dlogp of single tokens, given as (ratio, advantage)."""
    batches = [one_token(*token) for token in tokens]
    filled = batches + batches[:1] * (len(SEEDS) - len(batches))
    return gradients(name, filled, **options)[0][: len(tokens), 0, 0]


# The first row's ratio puts all of its tokens outside of every bound, with A > 0.
@pytest.mark.parametrize("name", ["minirl", "ppo", "gspo", "luspo", "gmpo", "dppo", "cpgd"])
@pytest.mark.parametrize("mode", ["token-mean", MODE, "seq-mean-token-sum"])
def test_a_clipped_row_stays_in_the_denominator(name, mode):
    first = np.arange(B) == 0
    clipped, silent = [], []
    for x in make_batches(staleness=1e-4):
        rollout = x.old if name == "dppo" else x.rollout  # its ratio is to the rollout policy
        logp = np.where(first[:, None], x.old + 1.5, x.logp)
        x = x._replace(logp=logp, rollout=rollout)
        clipped.append(x._replace(advantages=np.where(first, 1.0, x.advantages)))
        silent.append(x._replace(advantages=np.where(first, 0.0, x.advantages)))
    options = {"dppo": {"threshold": 1e-6}, "cpgd": {"drift": 0.0}}.get(name, {})
    actual, out, count = gradients(name, clipped, mode, **options)
    expected, _, _ = gradients(name, silent, mode, **options)
    np.testing.assert_allclose(actual, expected, atol=1e-7)
    for k, x in enumerate(clipped):
        assert np.asarray(out.clipped_high)[k, 0][x.mask[0]].all()
        assert count[k] == (x.mask.sum() if mode == "token-mean" else x.mask.any(1).sum())


@pytest.mark.parametrize("name", ["icepop", "sequence_mis", "geometric_mask", "veto"])
def test_a_dropped_response_stays_in_the_denominator(name):
    batches = []
    for x in make_batches(mismatch=0.0):
        away = np.where(np.arange(B) == 0, 20.0 if name == "veto" else -20.0, 0.0)
        batches.append(x._replace(rollout=x.rollout + away[:, None]))

    def dropped(*arrays):
        plain = objectives.ppo(*arrays)
        factor = getattr(corrections, name)(*arrays)
        out = corrections.correct(plain, factor)
        return factor, plain.loss, *aggregate(out.loss, arrays[-1], MODE)

    results = jax.vmap(dropped)(*to_jax(stack(batches), jnp.float32))
    for x, factor, plain, total, count in zip(batches, *map(np.asarray, results)):
        kept = x.mask & (np.arange(B) > 0)[:, None]
        np.testing.assert_allclose(factor, kept, atol=1e-6)
        assert count == x.mask.any(1).sum()
        rows = np.where(kept, plain, 0.0).sum(1) / np.maximum(x.mask.sum(1), 1)
        np.testing.assert_allclose(total, rows.sum(), rtol=1e-4, atol=1e-6)


INF, NAN = np.inf, np.nan
# Ragged rows (seed 0), a row without response (1), holes (2).
PADDING = {0: (NAN, 1e4, -1e4), 1: (INF, NAN, 1e4), 2: (-INF, NAN, -1e4)}


def dirty_and_clean():
    """Returns batches with garbage as padding, and the same batches with zeros there."""
    dirty, clean = [], []
    for seed, garbage in [(k, g) for k in PADDING for g in PADDING[k]]:
        x = make_inputs(seed, mismatch=0.5)
        padding = (garbage, -garbage, garbage / 2)
        dirty.append(Inputs(*(np.where(x.mask, y, g) for y, g in zip(x, padding)), *x[3:]))
        clean.append(Inputs(*(np.where(x.mask, y, 0.0) for y in x[:3]), *x[3:]))
    return dirty, clean


OPTIONS = {
    "vespo": ({}, {"tis_cap": 2.0}),
    "gspo": ({}, {"form": "token"}),
    "dppo": ({}, {"divergence": "kl"}),
    "m2po": ({}, {"moment": "full"}),
    "bapo": ({}, {"form": "code"}),
    "ppo": ({}, {"dual_clip": 3.0}),
}
VARIANTS = [(name, options) for name in sorted(GRADIENTS) for options in OPTIONS.get(name, ({},))]


@pytest.mark.fast
@pytest.mark.parametrize("name, options", VARIANTS, ids=str)
def test_padding_can_hold_anything(name, options):
    """0 · inf: masking after exp gives a finite loss and a gradient that is not a number.

    The last batches are as far off within the response: there, the bound must come before exp.
    """
    dirty, clean = dirty_and_clean()
    far = [x._replace(old=x.old + d, rollout=x.rollout + d) for x in clean[:1] for d in (1e4, -1e4)]
    gradient, out, _ = gradients(name, dirty + clean + far, **options)
    n = len(dirty)
    np.testing.assert_array_equal(gradient[:n], gradient[n : 2 * n])
    assert np.isfinite(gradient).all()
    for field in out:
        assert np.isfinite(field).all()


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted(FACTORS))
def test_padding_can_hold_anything_in_corrections(name):
    dirty, clean = dirty_and_clean()
    arrays = to_jax(stack(dirty + clean), jnp.float32)
    factor = np.asarray(jax.vmap(getattr(corrections, name))(*arrays))
    np.testing.assert_array_equal(factor[: len(dirty)], factor[len(dirty) :])
    assert np.isfinite(factor).all() and not factor[~np.asarray(arrays.mask)].any()


def test_cispo_bounds_are_relative():
    """clip_high = 4 cuts at 5, which others write as 5."""
    actual = slopes("cispo", (4.9, 1.0), (5.1, 1.0), (0.01, 1.0))
    np.testing.assert_allclose(actual, [-4.9, -5.0, -0.01], rtol=1e-5)
    np.testing.assert_allclose(slopes("cispo", (0.5, 1.0), clip_low=0.2), [-0.8], rtol=1e-5)


def test_gmpo_clips_in_log_space():
    """At ±.4 in log space: ratios of 1.49 and .67, not 1.4 and .6."""
    actual = slopes("gmpo", (1.45, 1.0), (1.5, 1.0), (0.68, -1.0), (0.65, -1.0))
    np.testing.assert_allclose(actual, [-1.45, 0.0, 0.68, 0.0], rtol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "bapo", "m2po", "minirl"])
def test_no_dual_clip_unless_asked_for(name):
    """verl has one at 3 by default: a bad token that became likely would go silent."""
    options = {"truncation": None} if name == "minirl" else {}
    np.testing.assert_allclose(slopes(name, (10.0, -1.0), **options), [10.0], rtol=1e-5)


def test_dual_clip():
    actual = slopes("ppo", (10.0, -1.0), (2.9, -1.0), (1.1, 1.0), (10.0, 1.0), dual_clip=3.0)
    np.testing.assert_allclose(actual, [0.0, 2.9, -1.1, 0.0], rtol=1e-5)


def test_icepop_bounds_are_on_train_over_rollout():
    """Asymmetric bounds are mirrored where a system divides the other way round."""
    for w, expected in ((4.0, 4.0), (0.25, 0.0), (5.1, 0.0), (0.51, 0.51)):
        arrays = to_jax(one_token(1.0, 1.0, mismatch=w), jnp.float32)
        factor = corrections.icepop(*arrays, low=0.5, high=5.0)
        np.testing.assert_allclose(factor[0, 0], expected, rtol=1e-5)


def test_spread_has_the_correction_of_bessel():
    """[1, 0, 0, 0]: .5, where numpy's default is .433."""
    rewards, group = np.array([1.0, 0, 0, 0]), np.zeros(4, int)
    np.testing.assert_allclose(standardized(rewards, group, eps=0.0)[0], 0.75 / 0.5, rtol=1e-6)
    biased = standardized(rewards, group, eps=0.0, ddof=0)[0]
    np.testing.assert_allclose(biased, 0.75 / np.sqrt(0.1875), rtol=1e-6)


@pytest.mark.parametrize(
    "advantage", [centered, standardized, leave_one_out, maxrl, gpg, clip_filter]
)
def test_a_group_of_one_has_no_baseline(advantage):
    """verl keeps the raw score here, but a reward without a comparison carries no information."""
    rewards, group = np.array([1.0, 1.0, 0.0, 1.0, 0.0]), np.array([0, 1, 1, 2, 2])
    out = np.asarray(advantage(rewards, group))
    assert np.isfinite(out).all() and out[0] == 0.0 and out[1] > 0 > out[2]


def test_a_group_of_one_after_whitening():
    """REINFORCE++ whitens after the baseline: what was 0 before is only shifted by the mean."""
    rewards, group = np.array([1.0, 1.0, 0.0, 1.0, 0.0]), np.array([0, 1, 1, 2, 2])
    np.testing.assert_allclose(reinforce_plus_plus(rewards, group)[0], 0.0, atol=1e-6)
