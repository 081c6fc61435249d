"""Dynamic sampling: draws rollouts until the rewards of each group differ.

A group whose scores are all equal has zero advantages and gives no gradient (DAPO,
https://arxiv.org/abs/2503.14476, §3.2), unless lengths are punished too or the batch is the
baseline. Groups of later rounds replace such groups, so that shapes never change. Groups that are
not needed are dropped, as in DAPO.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxrl_stable.run.judge import Judged, informative
from jaxrl_stable.trajectory import Trajectory


class Round(NamedTuple):
    """One rollout batch: each row's problem (its index in the source), response and verdict."""

    index: Int[np.ndarray, "B"]
    trajectory: Trajectory
    judged: Judged


def collect(
    draw: Callable[[int], Round],
    fill: Callable[[Trajectory, Trajectory, Int[Array, "B"]], Trajectory],
    group_size: int,
    max_rounds: int,
) -> tuple[Round, list[Judged]]:
    """Draws rounds until all groups are informative, or until `max_rounds` are drawn.

    Groups that remain uninformative stay in the batch. They give no gradient, and count in the
    denominators as they do without dynamic sampling.

    Args:
      draw: draws a round, given its number from 0.
      fill: `fill_rows`, jitted.
      group_size: responses per prompt.
      max_rounds: largest number of rounds.

    Returns:
      The batch, and the verdicts of every round. Statistics of the batch alone would be biased
      towards problems of medium difficulty.
    """
    batch = draw(0)
    verdicts = [batch.judged]
    kept = informative(batch.judged, group_size)
    while not kept.all() and len(verdicts) < max_rounds:
        fresh = draw(len(verdicts))
        verdicts.append(fresh.judged)
        fitting = np.flatnonzero(informative(fresh.judged, group_size))
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
