"""Parts of metrics agree with NumPy, and any split of the rows gives the metrics of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import (
    Correlation,
    EffectiveShare,
    Max,
    Mean,
    Min,
    Spread,
    Sum,
    collapse,
    finalize,
    masked_correlation,
    masked_max,
    masked_mean,
    masked_min,
    masked_spread,
    merge,
)
from jaxrl_stable.objectives import TokenLoss

CUTS = ((0, 1), (1, 6), (6, 11), (11, 12))


def values(metrics):
    return {name: float(value) for name, value in finalize(metrics).items()}


@pytest.mark.fast
def test_spread_is_numpys_standard_deviation():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(6, 5)), rng.random((6, 5)) < 0.6
    part = masked_spread(jnp.asarray(x), jnp.asarray(mask))
    assert float(part.value()) == pytest.approx(x[mask].std(), rel=1e-6)
    weight = np.exp(x)
    share = masked_spread(jnp.asarray(weight), jnp.asarray(mask), EffectiveShare).value()
    mean_square = (weight[mask] ** 2).mean()
    assert float(share) == pytest.approx(weight[mask].mean() ** 2 / mean_square, rel=1e-6)


@pytest.mark.fast
def test_a_small_spread_around_one_keeps_its_digits():
    """Negative control: E[x²] − E[x]² in float32 is nothing but rounding error."""
    x = (1 + 1e-4 * np.random.default_rng(0).normal(size=(8, 4000))).astype(np.float32)
    cut = [{"x": masked_spread(jnp.asarray(rows), jnp.ones(rows.shape, bool))} for rows in x]
    truth = x.astype(np.float64).std()
    assert values(merge(cut))["x"] == pytest.approx(truth, rel=1e-3)
    naive = np.mean(x**2, dtype=np.float32) - np.mean(x, dtype=np.float32) ** 2
    assert abs(naive / truth**2 - 1) > 0.5


@pytest.mark.fast
def test_correlation_is_numpys():
    rng = np.random.default_rng(0)
    x, noise = rng.random((2, 6, 5))
    y, mask = x + 0.1 * noise, rng.random((6, 5)) < 0.6
    part = masked_correlation(*map(jnp.asarray, (x, y, mask)))
    truth = np.corrcoef(x[mask], y[mask])[0, 1]
    assert 0.9 < truth < 0.999
    assert float(part.value()) == pytest.approx(truth, rel=1e-5)
    constant = masked_correlation(jnp.ones((6, 5)), jnp.asarray(y), jnp.asarray(mask))
    assert np.isnan(float(constant.value()))


@pytest.mark.fast
def test_of_nothing():
    """Sums are 0, extremes are neutral elements, a correlation is undefined; none of it spreads."""
    x, nowhere = jnp.array([[np.nan, np.inf]]), jnp.zeros((1, 2), bool)
    empty = {
        "mean": masked_mean(x, nowhere),
        "max": masked_max(x, nowhere),
        "min": masked_min(x, nowhere),
        "std": masked_spread(x, nowhere),
        "ess": masked_spread(x, nowhere, EffectiveShare),
        "pearson": masked_correlation(x, x, nowhere),
    }
    got = values(empty)
    assert np.isnan(got.pop("pearson"))
    assert got == {"mean": 0.0, "max": -np.inf, "min": np.inf, "std": 0.0, "ess": 0.0}
    y, mask = jnp.array([[1.0, 3.0]]), jnp.ones((1, 2), bool)
    full = {
        "mean": masked_mean(y, mask),
        "max": masked_max(y, mask),
        "min": masked_min(y, mask),
        "std": masked_spread(y, mask),
        "ess": masked_spread(y, mask, EffectiveShare),
        "pearson": masked_correlation(y, -y, mask),
    }
    expected = {"mean": 2.0, "max": 3.0, "min": 1.0, "std": 1.0, "ess": 0.8, "pearson": -1.0}
    assert values(merge([empty, full, empty])) == pytest.approx(expected)


def test_collapse_inside_jit():
    three = jnp.array([1.0, 5.0, 3.0])
    stacked = {
        "mean": Mean(three, jnp.ones(3)),
        "max": Max(three),
        "min": Min(three),
        "sum": Sum(three),
        "std": Spread(jnp.ones(3), three, jnp.zeros(3)),
        "pearson": Correlation(jnp.ones(3), three, three**2, *jnp.zeros((3, 3))),
    }
    got = values(jax.jit(collapse)(stacked))
    assert got == pytest.approx(
        {
            "mean": 3.0,
            "max": 5.0,
            "min": 1.0,
            "sum": 9.0,
            "std": np.std([1, 5, 3]),
            "pearson": np.corrcoef([1, 5, 3], [1, 25, 9])[0, 1],
        }
    )


@pytest.fixture(scope="module")
def arrays():
    """Makes ragged rows, one of them without a token, for a few different policies."""
    rng = np.random.default_rng(0)
    rows, width, layers, experts = 12, 7, 2, 4
    logp, old, rollout = rng.normal(size=(3, rows, width)) * 0.4 - 1.5
    lengths = rng.integers(1, width + 1, rows)
    lengths[5] = 0
    log_weight = logp - rollout
    factor = np.exp(old - rollout)
    names = dict(
        logp=logp,
        old=old,
        rollout=rollout,
        mask=np.arange(width) < lengths[:, None],
        advantages=rng.normal(size=rows),
        log_weight=log_weight,
        truncated=log_weight > 0.4,
        high=(log_weight > 0.3) & (rng.random((rows, width)) < 0.5),
        low=log_weight < -0.3,
        factor=np.where((factor > 0.6) & (factor < 1.5), factor, 0.0),
        agreement=rng.integers(0, 3, (rows, layers, width)) / 2,
        load=rng.integers(0, 9, (rows, layers, experts)),
        confidence=rng.random((rows, layers, width)),
        entropy=rng.random((rows, width)),
    )
    cast = lambda x: jnp.asarray(x, jnp.float32 if x.dtype != bool else bool)  # noqa: E731
    return {name: cast(x) for name, x in names.items()}


@jax.jit
def everything(a):
    """Computes every metric of the package on some rows."""
    mask = a["mask"]
    weight = jnp.minimum(jnp.exp(a["log_weight"]), jnp.exp(0.4))
    loss = TokenLoss(
        loss=jnp.zeros_like(weight),
        log_weight=a["log_weight"],
        weight=weight,
        truncated=a["truncated"],
        clipped_high=a["high"],
        clipped_low=a["low"],
    )
    by_layer = lambda x: jnp.moveaxis(x, 1, 0)  # noqa: E731
    return {
        "entropy": masked_mean(a["entropy"], mask),
        **diagnostics.mismatch_metrics(a["old"], a["rollout"], mask),
        **diagnostics.staleness_metrics(a["logp"], a["old"], mask),
        **diagnostics.weight_metrics(loss, mask),
        **diagnostics.correction_metrics(a["factor"], a["old"], a["rollout"], mask),
        **diagnostics.validity_metrics(a["logp"], a["old"], a["rollout"], a["advantages"], mask),
        **diagnostics.routing_metrics(by_layer(a["agreement"]), mask),
        **diagnostics.load_metrics(a["load"].sum(0), by_layer(a["confidence"]), mask),
    }


@pytest.mark.fast
def test_any_cut_gives_the_figures_of_the_whole(arrays):
    """Negative control: averaging the metrics of the parts gives other values for most of them."""
    cuts = [everything({k: x[i:j] for k, x in arrays.items()}) for i, j in CUTS]
    whole, merged = values(everything(arrays)), values(merge(cuts))
    assert len(whole) > 90 and set(merged) == set(whole)
    for name, value in whole.items():
        assert np.isfinite(value), name
        assert merged[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    naive = {name: np.mean([values(part)[name] for part in cuts]) for name in whole}
    others = {name for name in whole if abs(naive[name] - whole[name]) > 1e-4 * abs(whole[name])}
    assert len(others) > 0.9 * len(whole)
    derived = ("abs_token_std", "prob_pearson", "kl_entropy_ratio", "chi2_seq_product")
    assert {f"mismatch/{name}" for name in derived} | {"weight/ess", "weight/raw_std"} <= others


@pytest.mark.fast
@pytest.mark.parametrize("rubbish", [1e4, -1e4, np.nan, np.inf])
def test_padding_holds_anything_and_changes_nothing(arrays, rubbish):
    """Adds columns after responses and rows without one; weights are 0 there, as in objectives."""
    kept = {"agreement", "load", "confidence", "mask", "log_weight", "truncated", "high", "low"}
    dirty = {
        name: x
        if name in kept
        else jnp.where(arrays["mask"] if x.ndim == 2 else arrays["mask"].any(-1), x, rubbish)
        for name, x in arrays.items()
    }
    clean = values(everything(arrays))
    assert values(everything(dirty)) == pytest.approx(clean, rel=1e-6)
    more = {k: jnp.concatenate([x, jnp.zeros_like(x[:3])]) for k, x in arrays.items()}
    assert values(everything(more)) == pytest.approx(clean, rel=1e-6)


@pytest.mark.fast
def test_nothing_overflows(arrays):
    """Log-ratios of ±1e4 on real tokens."""
    huge = {k: jnp.where(x > -1.5, 0.0, -1e4) for k, x in arrays.items() if k in ("old", "rollout")}
    huge["log_weight"] = jnp.where(arrays["log_weight"] > 0, 1e4, -1e4)
    got = values(everything(arrays | huge))
    assert np.isfinite(list(got.values())).all()
