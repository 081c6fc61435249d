import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import Max, Mean, finalize
from jaxrl_stable.objectives import minirl

MASK = jnp.array([[True, True, False], [True, False, False]])


def values(metrics):
    return {name: float(value) for name, value in finalize(metrics).items()}


@pytest.mark.fast
def test_mismatch_by_hand():
    """Δ = 0.5, −0.25 and 1 on the three response tokens."""
    old = jnp.array([[-1.0, -2.0, 1e4], [-1.0, np.nan, 0.0]])
    rollout = jnp.array([[-1.5, -1.75, -1e4], [-2.0, 0.0, np.inf]])
    got = values(diagnostics.mismatch_metrics(old, rollout, MASK))
    delta = np.array([0.5, -0.25, 1.0])
    assert got["mismatch/kl_k1"] == pytest.approx(-delta.mean())
    assert got["mismatch/kl_k3"] == pytest.approx((np.exp(delta) - 1 - delta).mean())
    assert got["mismatch/abs_mean"] == pytest.approx(1.75 / 3)
    assert got["mismatch/abs_max"] == pytest.approx(1.0)
    assert got["mismatch/extreme_share"] == pytest.approx(1 / 3)  # |Δ| > ln 2


def test_staleness_by_hand():
    s = np.array([[0.1, -0.3, 9.0], [0.0, 9.0, 9.0]])
    got = values(diagnostics.staleness_metrics(jnp.asarray(s), jnp.zeros((2, 3)), MASK))
    on = np.array([0.1, -0.3, 0.0])
    assert got["staleness/abs_mean"] == pytest.approx(np.abs(on).mean())
    assert got["staleness/kl_k3"] == pytest.approx((np.exp(on) - 1 - on).mean(), rel=1e-4)
    assert got["staleness/ratio_deviation_max"] == pytest.approx(1 - math.exp(-0.3))


def test_weights_raw_and_truncated():
    ratio = jnp.array([[1.0, 8.0, 1.0], [2.0, 1.0, 1.0]])
    logp = jnp.log(ratio) - 3.0
    out = minirl(logp, logp, jnp.full((2, 3), -3.0), jnp.array([1.0, -1.0]), MASK)
    got = values(diagnostics.weight_metrics(out, MASK, 5.0))
    assert got["weight/raw_mean"] == pytest.approx(11 / 3)
    assert got["weight/raw_max"] == pytest.approx(8.0)
    assert got["weight/truncated_mean"] == pytest.approx(8 / 3)
    assert got["weight/truncated_max"] == pytest.approx(5.0)
    assert got["weight/over_cap_share"] == pytest.approx(1 / 3)
    assert got["weight/ess"] == pytest.approx((8 / 3) ** 2 / (30 / 3))
    assert "weight/square_mean" not in got


def test_clip_shares_count_each_side():
    s = jnp.array([[0.5, 0.0, 0.5], [-0.5, 0.0, 0.0]])
    old = jnp.full((2, 3), -1.0)
    out = minirl(old + s, old, old, jnp.array([1.0, -1.0]), MASK)
    got = values(diagnostics.weight_metrics(out, MASK, None))
    assert got["clip/high_share"] == pytest.approx(1 / 3)
    assert got["clip/low_share"] == pytest.approx(1 / 3)
    assert got["weight/over_cap_share"] == 0.0


@pytest.mark.fast
def test_routing_agreement_by_hand():
    """Two layers; the first token differs in layer 1 only, the second in none, the third is out."""
    agreement = jnp.array([[[1.0, 1.0, 0.0]], [[0.5, 1.0, 0.0]]])
    got = values(diagnostics.routing_metrics(agreement, jnp.array([[True, True, False]])))
    assert got["routing/agreement"] == pytest.approx(3.5 / 4)
    assert got["routing/agreement_layer_00"] == 1.0
    assert got["routing/agreement_layer_01"] == pytest.approx(0.75)
    assert got["routing/differing_tokens_share"] == pytest.approx(0.5)


def test_expert_load_by_hand():
    load = jnp.array([[6.0, 2.0, 0.0, 0.0]])
    confidence = jnp.array([[[0.5, 0.7, 0.0]]])
    got = values(diagnostics.load_metrics(load, confidence, jnp.array([[True, True, False]])))
    assert got["experts/max_violation"] == pytest.approx(6 / 8 * 4 - 1)
    assert got["experts/idle_share"] == pytest.approx(0.5)
    assert got["experts/confidence"] == pytest.approx(0.6)


def test_combining_parts_is_exact():
    """Any cut of the rows gives the figures of the whole: (total, count), never mean of means."""
    rng = np.random.default_rng(0)
    old, rollout = jnp.asarray(rng.normal(size=(2, 12, 7)), jnp.float32)
    mask = jnp.asarray(rng.random((12, 7)) < 0.3)
    whole = values(diagnostics.mismatch_metrics(old, rollout, mask))
    parts = [
        diagnostics.mismatch_metrics(old[i:j], rollout[i:j], mask[i:j])
        for i, j in ((0, 1), (1, 4), (4, 12))
    ]
    merged = values(diagnostics.merge(parts))
    for name, value in whole.items():
        assert merged[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    naive = np.mean([float(p["mismatch/kl_k1"].value()) for p in parts])
    assert abs(naive - whole["mismatch/kl_k1"]) > 1e-3


def test_collapse_inside_jit():
    stacked = {"a": Mean(jnp.arange(3.0), jnp.ones(3)), "b": Max(jnp.array([1.0, 5.0, 2.0]))}
    got = values(jax.jit(diagnostics.collapse)(stacked))
    assert got == {"a": 1.0, "b": 5.0}


def test_no_layers_no_metrics():
    valid = jnp.ones((1, 2), bool)
    assert diagnostics.routing_metrics(jnp.zeros((0, 1, 2)), valid) == {}
    assert diagnostics.load_metrics(jnp.zeros((0, 4)), jnp.zeros((0, 1, 2)), valid) == {}
