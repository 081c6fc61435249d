"""The training batch, and how it is split into mini-batches and micro-batches."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from functools import partial

import jax

from jaxrl_stable.array_types import Array, Bool, Float, Int
from jaxrl_stable.routing import Routing
from jaxrl_stable.sharding.rows import cut_rows
from jaxrl_stable.trajectory import Trajectory


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Inputs of an update; aligned as in `Trajectory`.

    Attributes:
      tokens, real, response_mask, logp_rollout: see `Trajectory`.
      advantages: advantage of each response.
      routing: experts to replay, or the rollout's experts for comparison.
      logp_old: log π_old; None if there is one update per rollout, which uses its own log π_θ.
      logp_reference: log-probabilities under the reference policy of the KL penalty, or None if
        there is no penalty.
      prompt_width: P, the number of prompt columns; static.
    """

    tokens: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    logp_rollout: Float[Array, "B T"]
    advantages: Float[Array, "B"]
    routing: Routing
    logp_old: Float[Array, "B T"] | None
    logp_reference: Float[Array, "B T"] | None
    prompt_width: int = dataclasses.field(metadata=dict(static=True))


def make_batch(trajectory: Trajectory, advantages: Float[Array, "B"]) -> TrainBatch:
    """Combines a rollout with its advantages, before `score`."""
    return TrainBatch(
        tokens=trajectory.tokens,
        real=trajectory.real,
        response_mask=trajectory.response_mask,
        logp_rollout=trajectory.logp_rollout,
        advantages=advantages,
        routing=trajectory.routing,
        logp_old=None,
        logp_reference=None,
        prompt_width=trajectory.prompt_width,
    )


def split(batch: TrainBatch, parts: int) -> TrainBatch:
    """Splits the rows into mini-batches, in order; every array gets a leading axis.

    This reshards: a mini-batch's contiguous rows start out on a few devices and end up spread over
    all of them. Only batch arrays move (tokens, log-probabilities, routing), once per rollout.
    """
    return _cut(batch, partial(cut_rows, parts=parts, in_order=True))


def micro_batches(batch: TrainBatch, parts: int) -> TrainBatch:
    """Splits the rows into micro-batches without moving them between devices."""
    return _cut(batch, partial(cut_rows, parts=parts))


def _cut(batch: TrainBatch, rows: Callable[..., Array]) -> TrainBatch:
    if batch.routing is None:
        raise ValueError(
            "TrainBatch.routing is None, so there is nothing to replay; pass the rollout's routing"
        )
    routing = Routing(rows(batch.routing.experts, axis=1), rows(batch.routing.valid))
    others = dataclasses.replace(batch, routing=None)
    return dataclasses.replace(jax.tree.map(rows, others), routing=routing)
