"""Means with intervals: avg@k, pass@k and the gain of a run over problems; anything over seeds.

For accuracy the unit of resampling is the *problem*: the k samples of one problem share its
difficulty, so they are not independent, and an interval that counted them as such would be too
narrow. Accuracies are fractions in [0, 1]. Numpy and scipy only.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy.special import stdtrit

DRAWS = 10_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def avg_at_k(correct: Num[np.ndarray, "problems k"], *, seed: int = 0) -> Estimate:
    """Mean over problems of the mean score over the k samples of each (avg@k).

    avg@k = (1/P) Σ_p (1/k) Σ_j correct[p, j]. Fractional scores are allowed.
    """
    scores = _scores(correct)
    return bootstrap_mean(scores.mean(axis=1), seed=seed)


def pass_at_k(correct: Bool[np.ndarray, "problems n"], k: int, *, seed: int = 0) -> Estimate:
    """Probability that at least one of k samples is correct, estimated from n ≥ k samples.

    Unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, eq. 1), with c correct of n:
    pass@k = mean_p [1 − C(n−c, k) / C(n, k)] = mean_p [1 − Π_{i=n−c+1}^{n} (1 − k/i)].
    The product form never forms the binomials, which overflow from n ≈ 60 on.

    Raises:
      ValueError: when k is not in 1..n, or an entry is neither 0 nor 1.
    """
    scores = _scores(correct)
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass_at_k: k={k} with {n} samples a problem; choose 1 <= k <= {n}")
    if not np.isin(scores, (0.0, 1.0)).all():
        raise ValueError("pass_at_k: entries must be 0 or 1; threshold fractional scores first")
    i = np.arange(1, n + 1)
    # Factor i is in the product where i > n − c. With fewer than k wrong samples that includes
    # i = k, whose factor is 0: every choice of k then holds a correct one, and pass@k is exactly 1.
    wrong = n - scores.sum(axis=1)
    factors = np.where(i > wrong[:, None], 1.0 - k / i, 1.0)
    return bootstrap_mean(1.0 - factors.prod(axis=1), seed=seed)


def gain(
    before: Num[np.ndarray, "problems k1"],
    after: Num[np.ndarray, "problems k2"],
    *,
    seed: int = 0,
) -> Estimate:
    """avg@k after minus avg@k before on the same problems in the same order (paired by problem).

    Pairing removes the spread of difficulty between problems, which the intervals of both separate
    scores contain; so this interval is the one to read for "did it improve?".
    """
    first, second = _scores(before), _scores(after)
    if len(first) != len(second):
        raise ValueError(
            f"gain: {len(first)} problems before, {len(second)} after; evaluate the same ones"
        )
    return bootstrap_mean(second.mean(axis=1) - first.mean(axis=1), seed=seed)


def bootstrap_mean(values: Float[np.ndarray, "problems"], *, seed: int = 0) -> Estimate:
    """Mean and percentile bootstrap interval (Efron 1979) from `DRAWS` resamples of the problems.

    Known limit: equal values give an interval of zero width, so 0 of 30 says less than it seems to.
    """
    values = np.asarray(values, np.float64)
    # Problems with equal values are interchangeable: drawing how often each *distinct* value comes
    # up has the same distribution as drawing problems, and needs (draws × distinct) memory only.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=DRAWS)
    means = drawn @ distinct / len(values)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(float(values.mean()), float(low), float(high))


def mean_over_seeds(values: Iterable[float]) -> Estimate:
    """Mean of one figure per seed, with Student's t interval: seeds are few, problems many.

    Raises:
      ValueError: fewer than two seeds, which have no interval.
    """
    values = np.array(tuple(values), np.float64)
    if len(values) < 2:
        raise ValueError(f"statistics: {len(values)} seeds; an interval needs at least 2")
    mean = values.mean()
    half = stdtrit(len(values) - 1, 0.5 + LEVEL / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(mean), float(mean - half), float(mean + half))


def _scores(correct) -> Float[np.ndarray, "problems k"]:
    scores = np.asarray(correct, np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"statistics: shape {scores.shape}; pass [problems, samples], not empty")
    if not np.isfinite(scores).all():
        raise ValueError("statistics: a score is not finite; count failed samples as 0")
    return scores
