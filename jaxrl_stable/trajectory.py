"""Trajectory: the samples that the sampler passes to the trainer."""

from __future__ import annotations

import dataclasses
import typing
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable.routing import Routing
from jaxrl_stable.sharding import ROWS, constrain, join_rows


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Prompts and sampled responses. Responses start at column `prompt_width`.

    Attributes:
      tokens: prompt (left-padded) and response (right-padded).
      real: True on prompt and response tokens, False on padding.
      response_mask: True exactly on sampled tokens, EOS included.
      logp_rollout: log μ_old of each sampled token, 0 elsewhere.
      routing: experts of each token that was fed to the model; the last token of a response was
        not.
      finished: whether the response ended with a stop token; False if it was cut off.
      prompt_width: P, static.
    """

    tokens: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    logp_rollout: Float[Array, "B T"]
    routing: Routing
    finished: Bool[Array, "B"]
    prompt_width: int = dataclasses.field(metadata=dict(static=True))


def join_trajectories(parts: Trajectory, over: tuple[str, ...]) -> Trajectory:
    """Joins stacked trajectories whose rows were split by `cut_rows`."""
    rows = partial(join_rows, over=over)
    routing = Routing(rows(parts.routing.experts, axis=1), rows(parts.routing.valid))
    others = jax.tree.map(rows, dataclasses.replace(parts, routing=None))
    return dataclasses.replace(others, routing=routing)


def fill_rows(old: Trajectory, new: Trajectory, rows: Int[Array, "B"]) -> Trajectory:
    """Replaces row i of `old` with row `rows[i]` of `new`; −1 keeps the old row.

    On a mesh, every device gathers all of `new`, which takes a lot of memory for long responses.
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
