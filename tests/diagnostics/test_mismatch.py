"""Mismatch and staleness: one example by hand, and the definitions written out in NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import Mean, finalize

# Two responses of two tokens and of one; Δ = ln 4, 0 and −ln 4.
MASK = np.array([[True, True, False], [True, False, False]])
OLD = np.log([[1 / 2, 1 / 2, 1], [1 / 8, 1, 1]])
ROLLOUT = np.log([[1 / 8, 1 / 2, 1], [1 / 2, 1, 1]])
L = math.log(4)
BY_HAND = {
    "kl_k1_token_mean": 0.0,
    "kl_k1_seq_mean": (-L / 2 + L) / 2,
    "kl_k3_token_mean": ((3 - L) + 0 + (L - 3 / 4)) / 3,
    "kl_k3_seq_mean": ((3 - L) / 2 + (L - 3 / 4)) / 2,
    "kl_k3_reverse_token_mean": ((L - 3 / 4) + 0 + (3 - L)) / 3,
    "js_token_mean": 2 / 3 * math.log(5 / 4),  # cosh ln 2 = 5/4
    "mult_prob_error_token_mean": (4 + 1 + 4) / 3,
    "abs_token_mean": 2 * L / 3,
    "abs_token_max": L,
    "abs_token_min": 0.0,
    "abs_token_std": L * math.sqrt(2) / 3,
    "extreme_share": 2 / 3,
    "chi2_token_mean": (16 + 1 + 1 / 16) / 3 - 1,
    "chi2_token_seq_mean": ((16 + 1) / 2 + 1 / 16) / 2 - 1,
    "chi2_seq_product": (16 + 1 / 16) / 2 - 1,
    "chi2_seq_geometric": (4 + 1 / 16) / 2 - 1,
    "ratio_token_mean": (4 + 1 + 1 / 4) / 3,
    "ratio_token_seq_mean": (5 / 2 + 1 / 4) / 2,
    "ratio_geometric_seq_mean": (2 + 1 / 4) / 2,
    "ratio_product_seq_mean": (4 + 1 / 4) / 2,
    "ppl_train_seq_mean": (2 + 8) / 2,
    "ppl_rollout_seq_mean": (4 + 2) / 2,
    "ppl_ratio_seq_mean": (1 / 2 + 4) / 2,  # the quotient of the means is 5/3
    "log_ppl_diff_abs_seq_mean": (L / 2 + L) / 2,
    "log_ppl_diff_seq_max": L,
    "log_ppl_diff_seq_min": -L / 2,
    "prob_abs_diff_token_mean": 1 / 4,
    "prob_abs_diff_token_max": 3 / 8,
    "prob_abs_diff_token_std": math.sqrt(1 / 32),
    "prob_pearson": -1 / 2,
    "prob_diff_seq_mean": (3 / 16 - 3 / 8) / 2,
    "prob_diff_sum_seq_mean": 0.0,
}


def values(metrics):
    return {name.split("/")[1]: float(value) for name, value in finalize(metrics).items()}


def measured(old, rollout, mask):
    arrays = (jnp.asarray(x, jnp.float32) for x in (old, rollout))
    return values(diagnostics.mismatch_metrics(*arrays, jnp.asarray(mask)))


@pytest.mark.fast
def test_by_hand():
    assert measured(OLD, ROLLOUT, MASK) == pytest.approx(BY_HAND, rel=1e-5, abs=1e-6)


def written_out(old, rollout, mask):
    """Computes the definitions in float64, one response at a time, as the systems write them."""
    rows = [(o[m], r[m]) for o, r, m in zip(old, rollout, mask, strict=True) if m.any()]
    o, r = (np.concatenate(x) for x in zip(*rows, strict=True))
    delta, p, q = o - r, np.exp(o), np.exp(r)
    each = lambda f: np.array([f(x - y) for x, y in rows])  # noqa: E731
    half = np.log((p + q) / 2)  # NeMo-RL's mixture
    k3 = lambda d: np.exp(d) - 1 - d  # noqa: E731
    difference = [np.exp(x) - np.exp(y) for x, y in rows]
    return {
        "kl_k1_token_mean": (-delta).mean(),
        "kl_k1_seq_mean": -each(np.mean).mean(),
        "kl_k3_token_mean": k3(delta).mean(),
        "kl_k3_seq_mean": each(lambda d: k3(d).mean()).mean(),
        "kl_k3_reverse_token_mean": k3(-delta).mean(),
        "js_token_mean": (k3(o - half) / 2 + k3(r - half) / 2).mean(),
        "mult_prob_error_token_mean": np.exp(np.abs(delta)).mean(),
        "abs_token_mean": np.abs(delta).mean(),
        "abs_token_max": np.abs(delta).max(),
        "abs_token_min": np.abs(delta).min(),
        "abs_token_std": np.abs(delta).std(),
        "extreme_share": (np.maximum(p / q, q / p) > 2).mean(),
        "chi2_token_mean": ((p / q) ** 2).mean() - 1,
        "chi2_token_seq_mean": each(lambda d: np.exp(2 * d).mean()).mean() - 1,
        "chi2_seq_product": (each(lambda d: np.exp(d).prod()) ** 2).mean() - 1,
        "chi2_seq_geometric": each(lambda d: np.exp(d.mean()) ** 2).mean() - 1,
        "ratio_token_mean": (p / q).mean(),
        "ratio_token_seq_mean": each(lambda d: np.exp(d).mean()).mean(),
        "ratio_geometric_seq_mean": each(lambda d: np.exp(d).prod() ** (1 / len(d))).mean(),
        "ratio_product_seq_mean": each(lambda d: np.exp(d).prod()).mean(),
        "ppl_train_seq_mean": np.mean([np.exp(-x.mean()) for x, _ in rows]),
        "ppl_rollout_seq_mean": np.mean([np.exp(-y.mean()) for _, y in rows]),
        "ppl_ratio_seq_mean": np.mean([np.exp(-x.mean()) / np.exp(-y.mean()) for x, y in rows]),
        "log_ppl_diff_abs_seq_mean": np.mean([abs(y.mean() - x.mean()) for x, y in rows]),
        "log_ppl_diff_seq_max": max(y.mean() - x.mean() for x, y in rows),
        "log_ppl_diff_seq_min": min(y.mean() - x.mean() for x, y in rows),
        "prob_abs_diff_token_mean": np.abs(p - q).mean(),
        "prob_abs_diff_token_max": np.abs(p - q).max(),
        "prob_abs_diff_token_std": np.abs(p - q).std(),
        "prob_pearson": np.corrcoef(p, q)[0, 1],
        "prob_diff_seq_mean": np.mean([d.mean() for d in difference]),
        "prob_diff_sum_seq_mean": np.mean([d.sum() for d in difference]),
    }


@pytest.mark.fast
@pytest.mark.parametrize("sigma", [0.02, 0.5])
def test_definitions_on_ragged_rows(sigma):
    """Means over tokens and over responses are different numbers, as are both χ² of responses."""
    rng = np.random.default_rng(0)
    rollout = np.log(rng.random((20, 9)))
    lengths = rng.integers(0, 10, 20)
    # Short responses are worse: otherwise means over tokens and over responses would be close.
    old = rollout + sigma * rng.normal(size=(20, 9)) * (3 / (1 + lengths))[:, None]
    mask = np.arange(9) < lengths[:, None]
    got, expected = measured(old, rollout, mask), written_out(old, rollout, mask)
    assert got == pytest.approx(expected, rel=2e-4, abs=2e-7)
    for a, b in (
        ("kl_k1_token_mean", "kl_k1_seq_mean"),
        ("kl_k3_token_mean", "kl_k3_seq_mean"),
        ("kl_k3_token_mean", "kl_k3_reverse_token_mean"),
        ("chi2_token_mean", "chi2_token_seq_mean"),
        ("chi2_seq_product", "chi2_seq_geometric"),
        ("prob_diff_seq_mean", "prob_diff_sum_seq_mean"),
    ):
        assert abs(got[a] - got[b]) > 1e-3 * abs(got[a]), (a, b)


@pytest.mark.fast
def test_equal_policies():
    same = np.log(np.random.default_rng(0).random((4, 5)))
    got = measured(same, same, np.ones((4, 5), bool))
    ones = {name for name in got if name.startswith(("mult_", "ratio_", "ppl_ratio"))}
    perplexities = {"ppl_train_seq_mean", "ppl_rollout_seq_mean"}
    assert {got[name] for name in ones} == {1.0} and len(ones) == 6
    assert got["ppl_train_seq_mean"] == got["ppl_rollout_seq_mean"] > 1
    assert got["prob_pearson"] == pytest.approx(1.0)
    rest = set(got) - ones - perplexities - {"prob_pearson"}
    assert {got[name] for name in rest} == {0.0}


@pytest.mark.fast
def test_small_differences_keep_their_digits():
    """Δ = 1e-3: ln cosh(Δ/2) is Δ²/8 and would round to 0 through cosh in float32."""
    old = np.full((1, 4), 1e-3)
    got = measured(old, np.zeros((1, 4)), np.ones((1, 4), bool))
    assert got["js_token_mean"] == pytest.approx(1e-6 / 8, rel=1e-3)
    assert got["kl_k3_token_mean"] == pytest.approx(1e-6 / 2, rel=1e-3)
    assert got["chi2_token_mean"] == pytest.approx(math.expm1(2e-3), rel=1e-5)


@pytest.mark.fast
def test_mismatch_in_units_of_the_entropy():
    """It is derived from combined parts, and only if the entropy was measured."""
    entropy = {"entropy": Mean(jnp.float32(6.0), jnp.float32(4.0))}
    mismatch = diagnostics.mismatch_metrics(jnp.asarray(OLD), jnp.asarray(ROLLOUT), MASK)
    assert "kl_entropy_ratio" not in values(mismatch)
    got = float(finalize(mismatch | entropy)["mismatch/kl_entropy_ratio"])
    assert got == pytest.approx(BY_HAND["kl_k3_token_mean"] / 1.5, rel=1e-5)
    assert "mismatch/kl_entropy_ratio" not in finalize(entropy)
    none = {"entropy": Mean(jnp.zeros(()), jnp.ones(()))}
    assert math.isnan(finalize(mismatch | none)["mismatch/kl_entropy_ratio"])


@pytest.mark.fast
def test_staleness_by_hand():
    s = np.array([[0.1, -0.3, 9.0], [0.0, 9.0, 9.0]])
    got = values(diagnostics.staleness_metrics(jnp.asarray(s), jnp.zeros((2, 3)), MASK))
    on = np.array([0.1, -0.3, 0.0])
    assert got["abs_token_mean"] == pytest.approx(np.abs(on).mean())
    assert got["kl_k3_token_mean"] == pytest.approx((np.exp(on) - 1 - on).mean(), rel=1e-4)
    assert got["ratio_deviation_max"] == pytest.approx(1 - math.exp(-0.3))
