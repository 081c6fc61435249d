"""Dynamic sampling: rollouts are drawn until every group of the batch has rewards that differ.

A group whose scores are all equal has advantages of 0 and gives no gradient (DAPO,
arXiv:2503.14476, §3.2), unless lengths are punished too or the batch is the baseline.
Groups of later rounds take the places of such groups, so that shapes never change; what is left
over of a round is dropped, as in DAPO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxrl_stable.judge import Judged, informative
from jaxrl_stable.rollout import Trajectory
from jaxrl_stable.routing import Routing
from jaxrl_stable.sharding import ROWS, constrain


class Round(NamedTuple):
    """One rollout batch: the place of each row's problem in the source, and what came of it."""

    index: Int[np.ndarray, "B"]
    trajectory: Trajectory
    judged: Judged


def collect(
    draw: Callable[[int], Round],
    fill: Callable[[Trajectory, Trajectory, Int[Array, "B"]], Trajectory],
    group_size: int,
    max_rounds: int,
) -> tuple[Round, list[Judged]]:
    """Draws rounds until all groups are informative, or `max_rounds` are drawn.

    Groups that are still uninformative then stay: they give no gradient, and count in the
    denominators as they do without dynamic sampling.

    Args:
      draw: the round of a number, from 0.
      fill: `fill_rows`, jitted.
      group_size: responses to a prompt.
      max_rounds: bound of the rounds.

    Returns:
      The batch, and the verdicts of every round: statistics of the batch alone would be biased
      towards problems of middling difficulty.
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
            Judged(*(_fill(a, b, rows) for a, b in zip(batch.judged, fresh.judged))),
        )
    return batch, verdicts


def fill_rows(old: Trajectory, new: Trajectory, rows: Int[Array, "B"]) -> Trajectory:
    """Row `rows[i]` of `new` in the place of row i of `old`; −1 keeps the old one.

    On a mesh every device sees all of `new` for it, which for long responses is much memory.
    """

    def pick(axis: int):
        def pick_rows(a: Array, b: Array) -> Array:
            shape = [1] * a.ndim
            shape[axis] = -1
            taken = jnp.take(b, jnp.maximum(rows, 0), axis=axis)
            filled = jnp.where((rows >= 0).reshape(shape), taken, a)
            return constrain(filled, *[None] * axis, ROWS)

        return pick_rows

    routing = Routing(
        pick(1)(old.routing.experts, new.routing.experts),
        pick(0)(old.routing.valid, new.routing.valid),
    )
    without = [dataclasses.replace(t, routing=None) for t in (old, new)]
    return dataclasses.replace(jax.tree.map(pick(0), *without), routing=routing)


def _fill(old: np.ndarray, new: np.ndarray, rows: Int[np.ndarray, "B"]) -> np.ndarray:
    return np.where(rows < 0, old, new[np.maximum(rows, 0)])
