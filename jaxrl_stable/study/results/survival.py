"""Time to collapse of the runs of a cell: Kaplan–Meier curves with Greenwood's bands."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from jaxrl_stable.statistics import LEVEL, Estimate
from jaxrl_stable.study.results.analysis import Outcome


@dataclasses.dataclass(frozen=True)
class Survival:
    """Share of runs without collapse after `steps` gradient steps; constant up to the next step."""

    steps: Float[np.ndarray, "points"]
    share: Float[np.ndarray, "points"]
    low: Float[np.ndarray, "points"]
    high: Float[np.ndarray, "points"]


def kaplan_meier(
    times: Sequence[int | float] | Float[np.ndarray, "runs"],
    collapsed: Sequence[bool] | Bool[np.ndarray, "runs"],
) -> Survival:
    """Returns the product-limit estimate of Kaplan and Meier 1958, from step 0 on.

    The 95 % band is Greenwood's on the scale log(−log S), which stays inside [0, 1]. It is
    undefined at shares of 1 and 0. Here both ends are 1 while the share is 1; when the share is 0,
    the lower end is 0 and the upper end keeps its last value. The band of a cell without collapses
    has no width, which does *not* mean certainty: read `share`.
    """
    times, collapsed = np.asarray(times, float), np.asarray(collapsed, bool)
    estimate = scipy.stats.ecdf(scipy.stats.CensoredData.right_censored(times, ~collapsed)).sf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about ends of the band that are undefined
        interval = estimate.confidence_interval(LEVEL, method="log-log")
    share = np.concatenate(([1.0], estimate.probabilities))
    low, high = (
        np.concatenate(([1.0], end.probabilities)) for end in (interval.low, interval.high)
    )
    low = np.where(share == 1, 1.0, np.where(share == 0, 0.0, low))
    high = np.where(share == 1, 1.0, high)
    for index in np.flatnonzero(np.isnan(high)):
        high[index] = high[index - 1]
    return Survival(np.concatenate(([0.0], estimate.quantiles)), share, low, high)


def survival(outcomes: Sequence[Outcome]) -> Survival:
    """Returns the survival of a cell; runs without collapse are censored at their end."""
    return kaplan_meier([o.time for o in outcomes], [o.collapsed for o in outcomes])


def share(outcomes: Sequence[Outcome], state: str) -> Estimate:
    """Returns the share of runs in a state ("collapsed", "stable", "not learned").

    The interval is the exact one of Clopper and Pearson 1934, which has width even if all runs
    agree.
    """
    found = scipy.stats.binomtest(sum(o.state == state for o in outcomes), len(outcomes))
    interval = found.proportion_ci(LEVEL, method="exact")
    return Estimate(float(found.statistic), float(interval.low), float(interval.high))
