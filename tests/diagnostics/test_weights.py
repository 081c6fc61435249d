"""Metrics of weights, clipping and corrections, by hand and as properties."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.diagnostics.weights import BUCKETS
from jaxrl_stable.objectives import minirl

# Three responses: of two tokens, and of one each.
MASK = jnp.array([[True, True], [True, False], [True, False]])
RATIO = np.array([[1.0, 8.0], [0.3, 1.0], [1.5, 1.0]])


def values(metrics):
    return {name: float(value) for name, value in finalize(metrics).items()}


def minirl_metrics(log_ratio, mask, advantages, **options):
    """Returns the metrics of MiniRL if π_θ differs from π_old = μ_old by `log_ratio`."""
    old = jnp.full(mask.shape, -3.0)
    loss = minirl(old + jnp.asarray(log_ratio), old, old, jnp.asarray(advantages), mask, **options)
    return values(diagnostics.weight_metrics(loss, mask))


@pytest.mark.fast
def test_weights_by_hand():
    got = minirl_metrics(np.log(RATIO), MASK, [1.0, -1.0, 1.0], truncation=5.0, clip=False)
    raw, used = np.array([1.0, 8.0, 0.3, 1.5]), np.array([1.0, 5.0, 0.3, 1.5])
    expected = {
        "raw_mean": 10.8 / 4,
        "raw_max": 8.0,
        "raw_min": 0.3,
        "raw_std": raw.std(),
        "raw_seq_mean": (4.5 + 0.3 + 1.5) / 3,
        "raw_seq_max": 4.5,
        "raw_seq_min": 0.3,
        "raw_seq_std": np.std([4.5, 0.3, 1.5]),
        "abs_log_mean": np.abs(np.log(raw)).mean(),
        "share_above_2": 1 / 4,
        "share_below_half": 1 / 4,
        "seq_share_above_2": 1 / 3,
        "seq_share_below_half": 1 / 3,
        "used_mean": 7.8 / 4,
        "used_max": 5.0,
        "used_min": 0.3,
        "used_std": used.std(),
        "truncated_share": 1 / 4,
        "ess": 1.95**2 / ((1 + 25 + 0.09 + 2.25) / 4),
        "bucket_000_025": 0.0,
        "bucket_025_050": 1 / 4,
        "bucket_050_090": 0.0,
        "bucket_090_110": 1 / 4,
        "bucket_110_200": 1 / 4,
        "bucket_200_400": 0.0,
        "bucket_400_up": 1 / 4,
    }
    weights = {name[7:]: value for name, value in got.items() if name.startswith("weight/")}
    assert weights == pytest.approx(expected, rel=1e-5)
    loose = minirl_metrics(np.log(RATIO), MASK, [1.0, -1.0, 1.0], truncation=None)
    assert loose["weight/truncated_share"] == 0.0
    assert loose["weight/used_max"] == loose["weight/raw_max"]


@pytest.mark.fast
def test_every_weight_is_in_one_bucket():
    """The buckets' bounds are those in their names, and leave no gap."""
    bounds = list(BUCKETS.values())
    assert bounds[0][0] == 0 and bounds[-1][1] == math.inf
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    for name, (low, high) in BUCKETS.items():
        end = "up" if high == math.inf else f"{round(100 * high):03d}"
        assert name == f"weight/bucket_{round(100 * low):03d}_{end}"
    log_ratio = np.concatenate([np.log([1 / 4, 1 / 2, 0.9, 1.1, 2, 4]), [-1e4, 1e4, 0.0]])
    got = minirl_metrics(log_ratio[None], jnp.ones((1, 9), bool), [1.0])
    assert sum(got[name] for name in BUCKETS) == pytest.approx(1.0)


@pytest.mark.fast
def test_equal_weights_have_the_full_sample_size():
    got = minirl_metrics(np.full((3, 2), 0.3), MASK, [0.0] * 3)
    assert got["weight/ess"] == pytest.approx(1.0) and got["weight/ess"] <= 1
    assert got["weight/used_std"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.fast
def test_clip_by_hand():
    """A token counts only if the clip acts, not if its advantage pulls the ratio back."""
    s = [[0.5, 0.0, -0.5, 0.5], [-0.5, 0.0, 0.5, 0.0], [-0.5, -0.5, 0.0, 0.0]]
    mask = jnp.array([[True] * 4, [True, True, True, False], [True, True, False, False]])
    got = minirl_metrics(s, mask, [1.0, -1.0, -1.0])
    assert got["clip/high_share"] == pytest.approx(2 / 9)
    assert got["clip/low_share"] == pytest.approx(3 / 9)
    assert got["clip/region_share"] == pytest.approx(5 / 9)
    assert got["clip/high_seq_max"] == pytest.approx(2 / 4)
    assert got["clip/low_seq_min"] == 0.0
    k3 = lambda x: math.exp(x) - 1 - x  # noqa: E731
    assert got["clip/kl_k3_clipped"] == pytest.approx((2 * k3(0.5) + 3 * k3(-0.5)) / 5, rel=1e-5)
    assert got["clip/kl_k3_kept"] == pytest.approx((k3(0.5) + k3(-0.5)) / 4, rel=1e-5)
    negative = minirl_metrics(s[1:], mask[1:], [-1.0, -1.0])
    assert negative["clip/low_seq_min"] == pytest.approx(1 / 3)


@pytest.mark.fast
def test_correction_by_hand():
    """One response keeps all, one loses a token of two, one loses all; a row has no response."""
    mask = jnp.array([[True, True], [True, True], [True, False], [False, False]])
    factor = jnp.array([[0.5, 1.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    rollout = jnp.full((4, 2), -1.0)
    delta = jnp.array([[0.1, 0.2], [1.0, 0.3], [-2.0, 9.0], [9.0, 9.0]])
    got = values(diagnostics.correction_metrics(factor, rollout + delta, rollout, mask))
    k3 = lambda *x: np.mean([math.exp(d) - 1 - d for d in x])  # noqa: E731
    assert got == pytest.approx(
        {
            "correction/factor_mean": 3.5 / 5,
            "correction/dropped_share": 2 / 5,
            "correction/dropped_response_share": 1 / 3,
            "correction/kl_k3_dropped": k3(1.0, -2.0),
            "correction/kl_k3_kept": k3(0.1, 0.2, 0.3),
        },
        rel=1e-4,
    )
    whole = values(diagnostics.mismatch_metrics(rollout + delta, rollout, mask))
    split = 2 / 5 * got["correction/kl_k3_dropped"] + 3 / 5 * got["correction/kl_k3_kept"]
    assert split == pytest.approx(whole["mismatch/kl_k3_token_mean"], rel=1e-5)


@pytest.mark.fast
def test_nothing_dropped():
    got = values(diagnostics.correction_metrics(jnp.ones((3, 2)), *[jnp.zeros((3, 2))] * 2, MASK))
    assert got == dict.fromkeys(got, 0.0) | {"correction/factor_mean": 1.0}
