"""Comparison of two cells over the same seeds: paired difference, tests, Holm's correction."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.stats
from jaxtyping import Float

from jaxrl_stable.statistics import Estimate, mean_over_seeds

# More than the 2^13 sign flips of 13 pairs, so the permutation test is exact up to 13 pairs.
PERMUTATIONS = 9_999


@dataclasses.dataclass(frozen=True)
class Paired:
    """The first cell minus the second, seed by seed.

    Attributes:
      pairs: number of seeds.
      difference: mean difference with Student's 95 % interval.
      p: p value of the claim's test; see `paired`.
      p_sign_flip: p value of the two-sided permutation test that flips the sign of each pair's
        difference.
      attainable: the smallest value that `p_sign_flip` can take with so many pairs, 2^(1−n).
      effect: Cohen's d_z, mean over standard deviation of the differences; NaN if they are equal.
      superiority: share of pairs in which the first is higher; a tie counts one half.
    """

    pairs: int
    difference: Estimate
    p: float
    p_sign_flip: float
    attainable: float
    effect: float
    superiority: float


def paired(
    first: Float[np.ndarray, "seeds"],
    second: Float[np.ndarray, "seeds"],
    expect: str = "higher",
    margin: float = 0.0,
) -> Paired:
    """Compares two cells over the same seeds, with the test that fits what is expected.

    p is twice the smaller of two p values, one of a t test for the expectation and one of a t test
    against it. It therefore agrees with the two-sided 95 % interval, in either direction:

    expect         for it                          against it
    "higher"       difference > 0                  difference < 0
    "lower"        difference < 0                  difference > 0
    "open"         difference > 0                  difference < 0
    "equal"        inside ±margin (the larger p    above margin, or below −margin (the smaller p,
                   of two: TOST, Schuirmann 1987)  doubled)
    "not higher"   difference < margin             difference > 0

    Student's t is the main evidence. The permutation test assumes nothing, but cannot reach a small
    p with few pairs: its p is at least 2^(1−n), 1/16 with 5 pairs. It is reported as a check. If
    all differences are equal, t is undefined and p comes from the sign test.

    Raises:
      ValueError: if there are fewer than two pairs, or a value is not finite.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    d = first - second
    if first.shape != second.shape or len(d) < 2 or not np.isfinite(d).all():
        raise ValueError(
            f"paired: {len(first)} and {len(second)} values; pass two or more finite pairs"
        )
    spread = d.std(ddof=1)
    flat = bool(spread <= 1e-12 * max(1.0, np.abs(d).max()))
    return Paired(
        pairs=len(d),
        difference=mean_over_seeds(d),
        p=_p(d, expect, margin, flat),
        p_sign_flip=sign_flip(first, second),
        attainable=2.0 ** (1 - len(d)),
        effect=math.nan if flat else float(d.mean() / spread),
        superiority=float(((d > 0) + 0.5 * (d == 0)).mean()),
    )


def sign_flip(first: Float[np.ndarray, "seeds"], second: Float[np.ndarray, "seeds"]) -> float:
    """Returns the two-sided p of the mean difference under sign flips; exact up to 13 pairs."""
    found = scipy.stats.permutation_test(
        (first, second),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
    """Adjusts p values (Holm 1979): p_(i) → max over j ≤ i of min(1, (m − j + 1) p_(j))."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(
        np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    )
    return adjusted


def _p(d: Float[np.ndarray, "seeds"], expect: str, margin: float, flat: bool) -> float:
    def above(center: float) -> float:
        """Returns the p value of "the mean is not above the center"."""
        if flat:
            return 0.5 ** len(d) if d[0] > center else 1.0
        return float(scipy.stats.ttest_1samp(d, center, alternative="greater").pvalue)

    def below(center: float) -> float:
        if flat:
            return 0.5 ** len(d) if d[0] < center else 1.0
        return float(scipy.stats.ttest_1samp(d, center, alternative="less").pvalue)

    if expect == "equal":
        for_it = max(above(-margin), below(margin))
        against = 2 * min(above(margin), below(-margin))
    else:
        for_it = below(margin if expect == "not higher" else 0.0)
        against = above(0.0)
    return min(1.0, 2 * min(for_it, against))
