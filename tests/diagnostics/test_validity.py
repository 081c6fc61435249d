"""Metrics of the first-order approximation: by hand, by enumeration, and as properties."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.diagnostics import finalize, merge, validity_metrics

MASK = np.array([[True, True, False], [True, False, False], [True, True, False]])
ADVANTAGES = np.array([1.0, -2.0, 0.5])
RATIOS = np.array([[1.5, 0.8, 1.0], [3.0, 1.0, 1.0], [3.0, 4.0, 1.0]])


@partial(jax.jit, static_argnames="tolerance")  # one compilation for each shape
def measured(*arrays, tolerance=0.1):
    return finalize(validity_metrics(*arrays, tolerance))


def values(logp, logp_old, logp_rollout, advantages, mask, **options):
    arrays = (
        None if x is None else jnp.asarray(x, jnp.float32)
        for x in (logp, logp_old, logp_rollout, advantages)
    )
    metrics = measured(*arrays, jnp.asarray(mask), **options)
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.fast
def test_by_hand():
    """S and F are 1.2 and 1.3, then 3 and 3 (one token, so nothing is dropped), then 12 and 6."""
    got = values(np.log(RATIOS), None, np.zeros((3, 3)), ADVANTAGES, MASK)
    e = [-0.1 / 1.3, 0.0, 6 / 12]
    assert got["validity/violating_share"] == pytest.approx(1 / 3)
    assert got["validity/value_error"] == pytest.approx((-e[0] + 0.5 * e[2]) / 3.5, rel=1e-5)
    assert got["validity/value_bias"] == pytest.approx((e[0] + 0.5 * e[2]) / 3.5, rel=1e-5)
    # Tokens: |1.2 − 1.5| / 1.5, |1.2 − 0.8| / 1.2; 0; |12 − 3| / 12, |12 − 4| / 12.
    g = (0.2 + 0.4 / 1.2) + 0.5 * (9 / 12 + 8 / 12)
    assert got["validity/gradient_error"] == pytest.approx(g / (1 * 2 + 2 * 1 + 0.5 * 2), rel=1e-5)
    for name in ("violating_share", "value_error", "gradient_error"):  # π_old is π_θ
        assert got[f"validity/mismatch_{name}"] == got[f"validity/{name}"]
        assert f"validity/staleness_{name}" not in got
    loose = values(np.log(RATIOS), None, np.zeros((3, 3)), ADVANTAGES, MASK, tolerance=0.07)
    assert loose["validity/violating_share"] == pytest.approx(2 / 3)


@pytest.mark.fast
def test_parts_and_what_neither_has_alone():
    """With mismatch on one token and staleness on the other, each alone is exactly first order."""
    mismatch, staleness = np.log([[1.5, 1.0]]), np.log([[1.0, 2.0]])
    rollout = np.full((1, 2), -1.0)
    old = rollout + mismatch
    got = values(old + staleness, old, rollout, [1.0], [[True, True]])
    assert got["validity/value_error"] == pytest.approx((3 - 2.5) / 3, rel=1e-5)
    assert got["validity/interaction"] == pytest.approx(0.5 / 3, rel=1e-5)
    assert got["validity/mismatch_value_error"] == pytest.approx(0, abs=1e-6)
    assert got["validity/staleness_value_error"] == pytest.approx(0, abs=1e-6)
    assert got["validity/mismatch_gradient_error"] == pytest.approx(0.5 / 1.5 / 2, rel=1e-5)
    assert got["validity/staleness_gradient_error"] == pytest.approx(1 / 2 / 2, rel=1e-5)
    # With both on both tokens, the parts differ and each has its own error.
    mismatch, staleness = np.log([[1.5, 1.5]]), np.log([[2.0, 2.0]])
    got = values(rollout + mismatch + staleness, rollout + mismatch, rollout, [1.0], [[True] * 2])
    assert got["validity/mismatch_value_error"] == pytest.approx(0.25 / 2.25, rel=1e-4)
    assert got["validity/staleness_value_error"] == pytest.approx(1 / 4, rel=1e-4)
    assert got["validity/value_error"] == pytest.approx(4 / 9, rel=1e-4)
    assert got["validity/interaction"] == pytest.approx(4 / 9 - 0.25 / 2.25 - 1 / 4, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.005, 0.5])
def test_two_tokens_enumerated(sigma):
    """Compares all responses of two tokens, weighted by probability, with sums written out.

    For small δ the divisor is 1 and the bias is J_seq − J_token itself.
    """
    rng = np.random.default_rng(0)
    V = 4
    normal = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))  # noqa: E731
    first, second = rng.normal(size=V), rng.normal(size=(V, V))
    mu = [normal(first), normal(second)]
    pi = [normal(z + sigma * rng.normal(size=z.shape)) for z in (first, second)]
    y = np.indices((V, V)).reshape(2, -1)
    logp_rollout, logp = (np.stack([a[y[0]], b[y[0], y[1]]], 1) for a, b in (mu, pi))
    probability = np.exp(logp_rollout.sum(1))
    reward = rng.integers(0, 2, V * V).astype(float)
    weighted = probability * (reward - probability @ reward)
    got = values(logp, None, logp_rollout, weighted, np.ones((V * V, 2), bool))

    ratios = np.exp(logp - logp_rollout)
    e = [(a * b - (a + b - 1)) / max(1.0, a * b, abs(a + b - 1)) for a, b in ratios]
    scale = np.abs(weighted).sum()
    assert got["validity/value_bias"] == pytest.approx(weighted @ e / scale, rel=1e-2)
    assert got["validity/value_error"] == pytest.approx(
        np.abs(weighted * e).sum() / scale, rel=1e-2
    )
    if sigma < 0.1:
        j_seq = (np.exp(logp.sum(1)) * (reward - probability @ reward)).sum()
        j_token = (weighted * ratios.sum(1)).sum()
        assert got["validity/value_bias"] * scale == pytest.approx(j_seq - j_token, rel=0.05)


@pytest.mark.fast
@pytest.mark.parametrize("rubbish", [1e4, -1e4, math.nan, math.inf])
def test_padding_changes_nothing(rubbish):
    """Columns after a response, and whole rows without one, including their advantage."""
    rng = np.random.default_rng(1)
    clean = rng.normal(size=(3, 4, 3)) * 0.3
    clean[:, ~np.vstack([MASK, [[False] * 3]])] = 0.0
    mask = np.vstack([MASK, [[False] * 3]])
    expected = values(*clean, [*ADVANTAGES, 0.0], mask)
    dirty = np.where(mask, clean, rubbish)
    dirty[1] = np.where(mask, clean[1], -rubbish)
    assert values(*dirty, [*ADVANTAGES, rubbish], mask) == expected
    shorter = values(*clean[:, :3], ADVANTAGES, MASK)
    assert shorter == pytest.approx(expected, rel=1e-6)


def test_zero_where_the_policies_agree():
    logp = np.random.default_rng(0).normal(size=(3, 3))
    got = values(logp, logp, logp, ADVANTAGES, MASK)
    assert len(got) == 11 and set(got.values()) == {0.0}


@pytest.mark.fast
@pytest.mark.parametrize("spread", ["constant", "random"])
def test_longer_responses_violate_more(spread):
    """With the same gap per token and longer responses, a small δ does not stay small."""
    rng = np.random.default_rng(0)
    shares = []
    for length in (4, 32, 256, 1024):
        w = np.full((400, length), 0.03)
        if spread == "random":
            w = w * rng.normal(size=w.shape)
        got = values(w, None, np.zeros_like(w), np.ones(400), np.ones_like(w, bool))
        shares.append(got["validity/violating_share"])
    assert shares == sorted(shares)
    assert shares[0] == 0.0 and shares[-1] > 0.6


def test_nothing_overflows():
    """Log-weights of ±1e4 on real tokens: every figure stays finite, and in its range."""
    w = np.array([[1e4, 1e4, 0.0], [-1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, 0.0, 0.1]])
    for row in w:
        mask = np.ones((1, 3), bool)
        got = values(row[None], np.zeros((1, 3)), -row[None], [1.0], mask)
        assert np.isfinite(list(got.values())).all()
        assert -1.0 <= got["validity/value_bias"] <= 1.4
        assert 0.0 <= got["validity/gradient_error"] <= 1.0


def test_second_order_is_not_lost_in_rounding():
    """δ = 1e-4: the error is 3e-8, less than float32 resolves at 1."""
    w = np.log1p(np.full((1, 3), 1e-4))
    got = values(w, None, np.zeros((1, 3)), [1.0], np.ones((1, 3), bool))
    assert got["validity/value_error"] == pytest.approx(3e-8, rel=0.01)


@pytest.mark.fast
def test_parts_combine_exactly_and_advantages_have_no_unit():
    rng = np.random.default_rng(0)
    logp, old, rollout = rng.normal(size=(3, 12, 7)) * 0.3
    mask = np.arange(7) < rng.integers(0, 8, 12)[:, None]
    advantages = rng.normal(size=12)
    whole = values(logp, old, rollout, advantages, mask)
    part = jax.jit(validity_metrics)
    parts = [
        part(*(jnp.asarray(x[i:j]) for x in (logp, old, rollout, advantages, mask)))
        for i, j in ((0, 4), (4, 5), (5, 12))
    ]
    merged = {name: float(value) for name, value in finalize(merge(parts)).items()}
    assert merged == pytest.approx(whole, rel=1e-5)
    small = values(logp, old, rollout, 1e-3 * advantages, mask)
    assert small == pytest.approx(whole, rel=1e-5)
    assert min(v for k, v in whole.items() if k != "validity/value_bias") > 0
