"""Advantages that subtract a baseline: the group's mean, the others' mean, or the batch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_stable.advantages.groups import group_statistics, nearly_equal
from jaxrl_stable.array_types import Array, Bool, Float, Int


def centered(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Returns Â_i = R_i − mean_{j in group(i)} R_j.

    Sources: https://arxiv.org/abs/2512.01374, §4.1; Dr.GRPO, https://arxiv.org/abs/2503.20783. Not
    divided by the standard deviation. The mean includes the sample itself, as in GRPO (the paper
    does not say).

    Args:
      rewards: one per response.
      group_ids: equal for responses to the same prompt; in [0, B).
      valid: False where the reward is missing.
      lengths: response tokens; unused here.

    Returns:
      One advantage per response; 0 where the reward is missing.

    Raises:
      ValueError: if an array is not [B].

    Example:
      A group of four and a group of one; then the same groups with two rewards missing.

      >>> rewards, group_ids = jnp.array([1.0, 0.0, 0.0, 1.0, 0.0]), jnp.array([0, 0, 0, 0, 1])
      >>> print(centered(rewards, group_ids))
      [ 0.5 -0.5 -0.5  0.5  0. ]
      >>> valid = jnp.array([True, True, False, False, True])
      >>> print(centered(rewards, group_ids, valid))
      [ 0.5 -0.5  0.   0.   0. ]
    """
    return group_statistics("centered", rewards, group_ids, valid, lengths).deviation


def standardized(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Float[Array, "B"]:
    """Returns Â_i = (R_i − group mean) / (std + eps), as in GRPO.

    Source: https://arxiv.org/abs/2402.03300, §4.1.2. The paper leaves ddof and eps open. All
    frameworks that we checked use ddof 1; eps is 1e-6 (verl, SkyRL, slime) or 1e-4 (TRL).

    Args:
      rewards, group_ids, valid, lengths: see `centered`.
      scale: "group" for the std of the group's rewards, or "batch" for the std of all rewards
        (TRL's `scale_rewards="batch"`).
      ddof: 1 divides the sum of squares by n − 1, 0 by n.
      eps: added to the std.

    Returns:
      One advantage per response; 0 where the reward is missing.

    Raises:
      ValueError: if the scale is unknown.
    """
    if scale not in ("group", "batch"):
        raise ValueError(f"standardized: scale {scale!r} is unknown; use 'group' or 'batch'")
    group = group_statistics("standardized", rewards, group_ids, valid, lengths)
    if scale == "group":
        squares, count = group.sum(jnp.square(group.deviation)), group.count
    else:
        count = group.keep.sum()
        mean = (group.keep * group.rewards).sum() / jnp.maximum(count, 1.0)
        squares = (group.keep * jnp.square(group.rewards - mean)).sum()
    std = jnp.sqrt(squares / jnp.maximum(count - ddof, 1.0)) + eps
    return group.deviation / jnp.where(std > 0, std, 1.0)


def leave_one_out(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    standardize: bool = False,
    eps: float = 1e-6,
    floor: float = 1e-2,
) -> Float[Array, "B"]:
    """Returns Â_i = R_i − mean_{j≠i} R_j = G/(G − 1) (R_i − group mean), as in RLOO.

    Source: https://arxiv.org/abs/2402.14740. The baseline does not depend on the sample, so the
    gradient is unbiased at any group size. `centered` equals this estimate times (1 − 1/G).

    Args:
      rewards, group_ids, valid, lengths: see `centered`.
      standardize: whether to divide by the std (ddof 1) of the *others*, plus eps, as NeMo RL does
        with its leave-one-out baseline. If the others are all equal, the difference is not divided.
      eps: added to that std.
      floor: share of the group's range, max R − min R. If the std of the others is below it, they
        also count as equal. R_i is not part of that std, so nothing else bounds the quotient: NeMo
        RL reports advantages of −2,000 where the others differ only by rounding. With `floor`, no
        advantage exceeds 1/floor in magnitude. With rewards of 0 and 1, the std never falls below
        the floor in groups of up to 1/floor².

    Returns:
      One advantage per response; 0 where the reward is missing.

    Raises:
      ValueError: if `floor` is not in (0, 1).
    """
    if not 0 < floor < 1:
        raise ValueError(f"leave_one_out: floor is {floor}; use a share of the range, in (0, 1)")
    group = group_statistics("leave_one_out", rewards, group_ids, valid, lengths)
    others = jnp.maximum(group.count - 1, 1.0)
    difference = group.deviation * group.count / others
    difference = jnp.where(group.count > 1, difference, 0.0)
    if not standardize:
        return difference
    squares = group.sum(jnp.square(group.deviation)) - jnp.square(group.deviation)
    # Shift the squares to the mean of the others, which differs from the group's by
    # deviation / others.
    squares -= jnp.square(group.deviation) / others
    std = jnp.sqrt(jnp.maximum(squares, 0.0) / jnp.maximum(others - 1, 1.0))
    equal = group.equal | (group.count < 3) | (std < floor * (group.highest - group.lowest))
    return jnp.where(equal, difference, difference / jnp.where(equal, 1.0, std + eps))


def reinforce_plus_plus(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    baseline: bool = True,
    eps: float = 1e-8,
) -> Float[Array, "B"]:
    """Returns Â = (x − mean) / √(var + eps), whitened over the whole batch, as in REINFORCE++.

    Source: https://arxiv.org/abs/2501.03262. x is R, or R − group mean with `baseline`. Mean and
    variance (with Bessel's correction) are over tokens, as in verl: a response counts `lengths`
    times.

    Args:
      rewards, group_ids, valid: see `centered`.
      lengths: response tokens; None counts each response once.
      baseline: whether to subtract the group's mean first (REINFORCE++-baseline).
      eps: added to the variance.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    group = group_statistics("reinforce_plus_plus", rewards, group_ids, valid, lengths)
    x = group.deviation if baseline else group.keep * group.rewards
    weight = group.keep if lengths is None else group.keep * lengths.astype(x.dtype)
    count = weight.sum()
    mean = (weight * x).sum() / jnp.maximum(count, 1.0)
    variance = (weight * jnp.square(x - mean)).sum() / jnp.maximum(count - 1, 1.0)
    # A rounding error in the mean over many tokens would be multiplied by up to 1/√eps.
    highest = jnp.where(group.keep > 0, x, -jnp.inf).max()
    lowest = jnp.where(group.keep > 0, x, jnp.inf).min()
    difference = jnp.where(nearly_equal(highest, lowest), 0.0, x - mean)
    return group.keep * difference * jax.lax.rsqrt(variance + eps)
