"""Statistics of the rewards of each group, repeated for each of its responses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable.array_types import Array, Bool, Float, Int
from jaxrl_stable.importance import at_least_float32
from jaxrl_stable.objectives.token_loss import check_same_shape

# Rewards count as equal if they differ by at most four units in the last place of float32, relative
# to the largest. Sums and products of a few float32 rewards differ by that much.
ROUNDING = 4 * float(np.finfo(np.float32).eps)


class Groups(NamedTuple):
    """Statistics of each response's group, repeated for each response.

    Attributes:
      rewards: rewards, 0 where missing.
      keep: 1 where there is a reward, else 0.
      ids: group ids.
      count, mean, highest, lowest: statistics over the group's responses that have a reward.
      equal: True if these rewards are all equal, up to rounding.
      deviation: rewards − mean, 0 where missing. Exactly 0 if the group's rewards are `equal`; a
        floating-point mean would be off in its last digit, and a division would blow up the error.
    """

    rewards: Float[Array, "B"]
    keep: Float[Array, "B"]
    ids: Int[Array, "B"]
    count: Float[Array, "B"]
    mean: Float[Array, "B"]
    highest: Float[Array, "B"]
    lowest: Float[Array, "B"]
    equal: Bool[Array, "B"]
    deviation: Float[Array, "B"]

    def sum(self, x: Float[Array, "B"] | Bool[Array, "B"]) -> Float[Array, "B"]:
        """Returns the sum over the group's responses that have a reward."""
        return _group_sum(self.keep * x, self.ids)


def group_statistics(
    function: str,
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None,
    lengths: Int[Array, "B"] | None,
) -> Groups:
    """Computes group statistics from an estimator's arguments; `function` is its name, for errors.

    Raises:
      ValueError: if an array is not [B].
    """
    arrays = {"rewards": rewards, "group_ids": group_ids, "valid": valid, "lengths": lengths}
    check_same_shape(function, "B", **arrays)
    rewards = at_least_float32(rewards)
    keep = jnp.ones_like(rewards) if valid is None else valid.astype(rewards.dtype)
    rewards = jnp.where(keep > 0, rewards, 0.0)
    count = _group_sum(keep, group_ids)
    size = rewards.shape[0]
    known = jnp.where(keep > 0, rewards, -jnp.inf)
    highest = jax.ops.segment_max(known, group_ids, num_segments=size)[group_ids]
    known = jnp.where(keep > 0, rewards, jnp.inf)
    lowest = jax.ops.segment_min(known, group_ids, num_segments=size)[group_ids]
    mean = _group_sum(rewards, group_ids) / jnp.maximum(count, 1.0)
    mean = jnp.where(highest == lowest, highest, mean)
    equal = nearly_equal(highest, lowest)
    deviation = jnp.where((keep > 0) & ~equal, rewards - mean, 0.0)
    return Groups(rewards, keep, group_ids, count, mean, highest, lowest, equal, deviation)


def nearly_equal(
    highest: Float[Array, "*shape"], lowest: Float[Array, "*shape"]
) -> Bool[Array, "*shape"]:
    """Returns True where the highest and lowest rewards differ only by rounding."""
    bound = ROUNDING * jnp.maximum(jnp.abs(highest), jnp.abs(lowest))
    return (highest - lowest <= bound) & jnp.isfinite(bound)


def _group_sum(x: Float[Array, "B"], group_ids: Int[Array, "B"]) -> Float[Array, "B"]:
    return jax.ops.segment_sum(x, group_ids, num_segments=x.shape[0])[group_ids]
