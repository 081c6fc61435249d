"""Baselines: from one reward per response to one advantage per response."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxrl_stable.importance import at_least_float32

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def centered(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Group-mean baseline without division by the standard deviation (arXiv:2512.01374, §4.1).

        Â_i = R_i − mean_{j in group(i)} R_j

    The mean includes the sample itself, as in GRPO (the paper does not say). A group of one has
    advantage 0.

    Args:
      rewards: one per response.
      group_ids: responses with equal id answer the same prompt; ids lie in [0, B).
      valid: False where the reward is missing (a checker that failed is no wrong answer): such a
        response is left out of the mean and gets advantage 0.
    """
    size = rewards.shape[0]
    keep = jnp.ones(size, jnp.float32) if valid is None else valid.astype(jnp.float32)
    rewards = jnp.where(keep > 0, at_least_float32(rewards), 0.0)
    total = jax.ops.segment_sum(rewards, group_ids, num_segments=size)
    count = jax.ops.segment_sum(keep, group_ids, num_segments=size)
    baseline = total / jnp.maximum(count, 1.0)
    return keep * (rewards - baseline[group_ids])
