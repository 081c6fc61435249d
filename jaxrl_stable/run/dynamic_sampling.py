"""Dynamic sampling: draws rollouts until each group teaches something.

A group is informative if any of its responses has an advantage other than 0 (DAPO,
https://arxiv.org/abs/2503.14476, §3.2). `Programs.informative` decides this with the run's
estimator, after the overlong filter. Like DAPO, it looks only at scores: a length penalty, a KL
term or an entropy bonus gives other groups a gradient, too, but says nothing about their problems.
If the baseline is the group's, scores within the group must differ. If it is the batch's
(`reinforce_plus_plus` with `baseline=False`), a group with equal scores, or with a single response,
can be informative.

Informative groups from later rounds replace uninformative ones, so shapes never change. Surplus
groups are dropped, as in DAPO.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxrl_stable.run.judge import Judged
from jaxrl_stable.trajectory import Trajectory


class Round(NamedTuple):
    """One rollout batch: each row's problem (its index in the source), response and verdict."""

    index: Int[np.ndarray, "B"]
    trajectory: Trajectory
    judged: Judged


def collect(
    draw: Callable[[int], Round],
    fill: Callable[[Trajectory, Trajectory, Int[Array, "B"]], Trajectory],
    informative: Callable[[Judged], Bool[np.ndarray, "groups"]],
    group_size: int,
    max_rounds: int,
) -> tuple[Round, list[Judged]]:
    """Draws rounds until all groups are informative, or until `max_rounds` are drawn.

    Groups that are still uninformative then stay in the batch. Their scores give no gradient, and
    they count in the denominators, as they do without dynamic sampling.

    Args:
      draw: draws a round, given its number, which starts at 0.
      fill: `fill_rows`, jitted.
      informative: marks the informative groups of a batch.
      group_size: responses per prompt.
      max_rounds: largest number of rounds.

    Returns:
      The batch, and the verdicts of every round. Statistics of the batch alone would be biased
      towards problems of medium difficulty.
    """
    batch = draw(0)
    verdicts = [batch.judged]
    if max_rounds == 1:
        return batch, verdicts
    kept = np.array(informative(batch.judged))
    while not kept.all() and len(verdicts) < max_rounds:
        fresh = draw(len(verdicts))
        verdicts.append(fresh.judged)
        fitting = np.flatnonzero(informative(fresh.judged))
        places = np.flatnonzero(~kept)[: len(fitting)]
        kept[places] = True
        rows = np.full((len(kept), group_size), -1)
        rows[places] = fitting[: len(places), None] * group_size + np.arange(group_size)
        rows = rows.ravel()
        batch = Round(
            _fill(batch.index, fresh.index, rows),
            fill(batch.trajectory, fresh.trajectory, rows),
            jax.tree.map(partial(_fill, rows=rows), batch.judged, fresh.judged),
        )
    return batch, verdicts


def _fill(old: np.ndarray, new: np.ndarray, rows: Int[np.ndarray, "B"]) -> np.ndarray:
    return np.where(rows < 0, old, new[np.maximum(rows, 0)])
