"""Means with confidence intervals: avg@k, pass@k and gains over problems, and means over seeds.

The module also has a running mean for smoothing curves.

Accuracies are resampled by *problem*. The k samples of a problem share its difficulty, so they are
not independent, and an interval that treats them as independent is too narrow. Accuracies are
fractions in [0, 1]. The module needs only numpy and scipy.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from scipy.special import ndtr, stdtrit

DRAWS = 10_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def avg_at_k(
    correct: Num[np.ndarray, "problems k"] | Bool[np.ndarray, "problems k"], *, seed: int = 0
) -> Estimate:
    """Returns avg@k: the mean over problems of each problem's mean score over k samples.

    avg@k = (1/P) Σ_p (1/k) Σ_j correct[p, j]. Fractional scores are allowed. NaN marks a sample
    whose score is unknown. Such samples are excluded, and so are problems without any known score.
    """
    return bootstrap_mean(_means(_scores(correct))[1], seed=seed)


def pass_at_k(
    correct: Num[np.ndarray, "problems n"] | Bool[np.ndarray, "problems n"],
    k: int,
    *,
    seed: int = 0,
) -> Estimate:
    """Returns the probability that at least one of k samples is correct, from n ≥ k samples.

    This is the unbiased estimator of Chen et al. 2021 (https://arxiv.org/abs/2107.03374, eq. 1).
    With c of n samples correct,
    pass@k = mean_p [1 − C(n−c, k) / C(n, k)] = mean_p [1 − Π_{i=n−c+1}^{n} (1 − k/i)].
    The product form avoids the binomials, which overflow from n ≈ 60 on. NaN marks a sample whose
    score is unknown: n counts only a problem's known samples, and problems with fewer than k known
    samples are excluded.

    Raises:
      ValueError: if no problem has k known samples, k is less than 1, or an entry is not 0, 1 or
        NaN.
    """
    scores = _scores(correct)
    known = ~np.isnan(scores)
    n = known.sum(axis=1)
    if not 1 <= k <= n.max():
        raise ValueError(
            f"pass_at_k: k={k} with {n.max()} samples per problem; choose 1 <= k <= {n.max()}"
        )
    if not np.isin(scores[known], (0.0, 1.0)).all():
        raise ValueError("pass_at_k: entries must be 0 or 1; threshold fractional scores first")
    i = np.arange(1, scores.shape[1] + 1)
    # Factor i is in the product if n − c < i ≤ n. With fewer than k wrong samples this includes
    # i = k, whose factor is 0, so pass@k is exactly 1: every k samples include a correct one.
    wrong = n - np.nansum(scores, axis=1)
    among = (i > wrong[:, None]) & (i <= n[:, None])
    factors = np.where(among, 1.0 - k / i, 1.0)
    return bootstrap_mean((1.0 - factors.prod(axis=1))[n >= k], seed=seed)


def gain(
    before: Num[np.ndarray, "problems k1"],
    after: Num[np.ndarray, "problems k2"],
    *,
    seed: int = 0,
) -> Estimate:
    """Returns the paired gain in avg@k, after minus before, over the same problems in order.

    Pairing removes the differences in difficulty between problems, which widen the intervals of the
    two separate scores. To answer "did it improve?", read this interval. Problems without a known
    score on either side are excluded.

    Raises:
      ValueError: if the numbers of problems differ, or no problem has a known score on both sides.
    """
    first, second = _scores(before), _scores(after)
    if len(first) != len(second):
        raise ValueError(
            f"gain: {len(first)} problems before, {len(second)} after; evaluate the same problems"
        )
    (known_before, before), (known_after, after) = _means(first), _means(second)
    difference = np.full(len(first), np.nan)
    difference[known_after] = after
    difference[known_before] -= before
    both = known_before & known_after
    if not both.any():
        raise ValueError("gain: no problem has a known score both before and after")
    return bootstrap_mean(difference[both], seed=seed)


def bootstrap_mean(values: Float[np.ndarray, "problems"], *, seed: int = 0) -> Estimate:
    """Returns the mean and its percentile bootstrap interval (Efron 1979).

    The interval uses `DRAWS` resamples of the problems. Known limitation: if all values are equal,
    it has zero width, so a score of 0 out of 30 looks more certain than it is.
    """
    values = np.asarray(values, np.float64)
    # Problems with equal values are interchangeable: drawing how often each *distinct* value occurs
    # has the same distribution as drawing problems, and needs only (draws × distinct) memory.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=DRAWS)
    means = drawn @ distinct / len(values)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(float(values.mean()), float(low), float(high))


def mean_over_seeds(values: Iterable[float]) -> Estimate:
    """Returns the mean over seeds with Student's t interval, which suits small samples.

    Raises:
      ValueError: if there are fewer than two seeds.
    """
    values = np.array(tuple(values), np.float64)
    if len(values) < 2:
        raise ValueError(f"statistics: got {len(values)} seeds; an interval needs at least 2")
    mean = values.mean()
    half = stdtrit(len(values) - 1, 0.5 + LEVEL / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(mean), float(mean - half), float(mean + half))


def bootstrap_band(
    values: Float[np.ndarray, "runs points"], *, draws: int = 2_000, seed: int = 0
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
    """Returns the mean over runs with a pointwise 95 % bootstrap interval.

    Whole runs are resampled, so curves stay intact. The plain percentile interval is too narrow for
    few runs (with 5 normally distributed runs, it covers the mean in only 84 % of cases). We
    therefore use Hesterberg's "expanded" percentiles (https://arxiv.org/abs/1411.5279), which match
    the tail to Student's t: Φ(−√(n/(n−1)) t₀.₉₇₅,ₙ₋₁). With up to 4 runs, the interval spans the
    lowest to the highest run. NaNs are excluded point by point. A point needs two runs for an
    interval.

    Returns:
      (mean, low, high), NaN where undefined.
    """
    values = np.asarray(values, np.float64)
    runs = len(values)
    known = np.isfinite(values)
    filled, counts = np.where(known, values, 0.0), known.sum(axis=0)
    mean = np.where(counts > 0, filled.sum(axis=0) / np.maximum(counts, 1), np.nan)
    if runs < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    drawn = np.random.default_rng(seed).multinomial(runs, np.full(runs, 1 / runs), size=draws)
    weights = drawn @ known
    means = np.where(weights > 0, drawn @ filled / np.maximum(weights, 1), np.nan)
    quantile = stdtrit(runs - 1, 0.5 + LEVEL / 2)
    tail = ndtr(-np.sqrt(runs / (runs - 1)) * quantile)
    enough = counts > 1
    ends = np.full((2, values.shape[1]), np.nan)
    if enough.any():
        ends[:, enough] = np.nanquantile(means[:, enough], (tail, 1 - tail), axis=0)
    return mean, *ends


def smooth(y: Float[np.ndarray, "points"], width: int | None = None) -> Float[np.ndarray, "points"]:
    """Returns a centred running mean that ignores NaNs.

    Args:
      y: the curve.
      width: window width, an odd number of points; by default 1/20 of the curve, at least 5.
    """
    if not len(y):
        return y
    width = max(5, len(y) // 20) | 1 if width is None else width
    finite = np.isfinite(y)
    total, count = (
        np.convolve(values, np.ones(width), "full")[width // 2 :][: len(y)]
        for values in (np.where(finite, y, 0), finite.astype(float))
    )
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _scores(correct: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "problems k"]:
    scores = np.asarray(correct, np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(
            f"statistics: scores have shape {scores.shape}; pass [problems, samples], not empty"
        )
    if np.isinf(scores).any() or np.isnan(scores).all():
        raise ValueError(
            "statistics: scores must not be infinite or all NaN; NaN marks an unknown score"
        )
    return scores


def _means(
    scores: Float[np.ndarray, "problems k"],
) -> tuple[Bool[np.ndarray, "problems"], Float[np.ndarray, "known"]]:
    """Returns a mask of the problems with a known score, and the mean score of each of these."""
    known = ~np.isnan(scores)
    some = known.any(axis=1)
    return some, np.nansum(scores[some], axis=1) / known[some].sum(axis=1)
