"""Advantages: from one reward per response to one advantage per response.

All share one signature, `f(rewards, group_ids, valid=None, lengths=None, *, …) -> advantages`.
Responses with equal ids answer the same prompt; ids are in [0, B). Where `valid` is False the
reward is missing (a checker that failed is not a wrong answer): such a response is excluded from
every statistic and gets advantage 0. If the group is the baseline, a group of one has advantage 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float, Int
from jaxrl_stable.importance import at_least_float32
from jaxrl_stable.objectives.token_loss import check_same_shape


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
      A group of four and a group of one; then the same with two rewards missing.

      >>> rewards, group_ids = jnp.array([1.0, 0.0, 0.0, 1.0, 0.0]), jnp.array([0, 0, 0, 0, 1])
      >>> print(centered(rewards, group_ids))
      [ 0.5 -0.5 -0.5  0.5  0. ]
      >>> valid = jnp.array([True, True, False, False, True])
      >>> print(centered(rewards, group_ids, valid))
      [ 0.5 -0.5  0.   0.   0. ]
    """
    return _groups("centered", rewards, group_ids, valid, lengths).deviation


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
    systems that we checked use ddof 1; eps is 1e-6 (verl, SkyRL, slime) or 1e-4 (TRL).

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
    group = _groups("standardized", rewards, group_ids, valid, lengths)
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
) -> Float[Array, "B"]:
    """Returns Â_i = R_i − mean_{j≠i} R_j = G/(G − 1) (R_i − group mean), as in RLOO.

    Source: https://arxiv.org/abs/2402.14740. The baseline does not depend on the sample, so the
    gradient is unbiased at any group size; `centered` is (1 − 1/G) times it.

    Args:
      rewards, group_ids, valid, lengths: see `centered`.
      standardize: divide by the std (ddof 1) of the *others*, plus eps, as NeMo RL does with its
        leave-one-out baseline. If the others are all equal, the difference is not divided.
      eps: added to that std.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    group = _groups("leave_one_out", rewards, group_ids, valid, lengths)
    others = jnp.maximum(group.count - 1, 1.0)
    difference = group.deviation * group.count / others
    difference = jnp.where(group.count > 1, difference, 0.0)
    if not standardize:
        return difference
    squares = group.sum(jnp.square(group.deviation)) - jnp.square(group.deviation)
    # Move the squares to the mean of the others, which is deviation / others from the group's.
    squares -= jnp.square(group.deviation) / others
    std = jnp.sqrt(jnp.maximum(squares, 0.0) / jnp.maximum(others - 1, 1.0))
    # Rounding keeps the difference of sums above 0, so equality is decided on the rewards.
    at_highest, at_lowest = group.rewards == group.highest, group.rewards == group.lowest
    alone = (at_highest & (group.sum(at_lowest) == others)) | (
        at_lowest & (group.sum(at_highest) == others)
    )
    equal = (group.highest == group.lowest) | alone | (group.count < 3)
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
      baseline: subtract the group's mean first (REINFORCE++-baseline).
      eps: added to the variance.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    group = _groups("reinforce_plus_plus", rewards, group_ids, valid, lengths)
    x = group.deviation if baseline else group.keep * group.rewards
    weight = group.keep if lengths is None else group.keep * lengths.astype(x.dtype)
    count = weight.sum()
    mean = (weight * x).sum() / jnp.maximum(count, 1.0)
    variance = (weight * jnp.square(x - mean)).sum() / jnp.maximum(count - 1, 1.0)
    return group.keep * (x - mean) * jax.lax.rsqrt(variance + eps)


def maxrl(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "B"]:
    """Returns Â_i = (R_i − group mean) / (group mean + eps): maximum likelihood RL.

    Source: https://arxiv.org/abs/2602.02710; the form is from SkyRL's code, the paper was not read.
    For rewards of 0 and 1: hard problems weigh 1/p, as in a likelihood.

    Args:
      rewards, group_ids, valid, lengths: see `centered`; rewards are non-negative.
      eps: added to the mean.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    group = _groups("maxrl", rewards, group_ids, valid, lengths)
    return group.deviation / (group.mean + eps)


def gpg(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Returns Â_i = (R_i − group mean) · B / #{j: R_j ≠ 0}, as in GPG.

    Source: https://arxiv.org/abs/2504.02546, in the form of verl's code.

    Args:
      rewards, group_ids, valid, lengths: see `centered`.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    group = _groups("gpg", rewards, group_ids, valid, lengths)
    nonzero = (group.keep * (group.rewards != 0)).sum()
    return group.deviation * group.keep.sum() / jnp.maximum(nonzero, 1.0)


def clip_filter(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    cap: float = 3.0,
) -> Float[Array, "B"]:
    """Returns Â_i = (R_i − group mean) · min(cap, groups / groups with spread), as in CPGD.

    Source: https://arxiv.org/abs/2505.12504; the form is from siiRL's code, the paper was not read.
    Groups of equal rewards give no gradient; the factor lets the other groups make up for them.

    Args:
      rewards, group_ids, valid, lengths: see `centered`.
      cap: largest factor.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    group = _groups("clip_filter", rewards, group_ids, valid, lengths)
    spread = (group.keep > 0) & (group.highest > group.lowest)
    share = 1 / jnp.maximum(group.count, 1.0)  # sums to 1 over a group
    groups, informative = (group.keep * share).sum(), (spread * share).sum()
    return group.deviation * jnp.minimum(cap, groups / jnp.maximum(informative, 1.0))


class _Groups(NamedTuple):
    """Statistics of each response's group, repeated for each response.

    Attributes:
      rewards: rewards, 0 where missing.
      keep: 1 where there is a reward, else 0.
      ids: group ids.
      count, mean, highest, lowest: statistics over the group's responses that have a reward.
      deviation: rewards − mean, 0 where missing. Exactly 0 if all rewards of the group are equal; a
        floating-point mean would be off by its last digit, and a division would blow that up.
    """

    rewards: Float[Array, "B"]
    keep: Float[Array, "B"]
    ids: Int[Array, "B"]
    count: Float[Array, "B"]
    mean: Float[Array, "B"]
    highest: Float[Array, "B"]
    lowest: Float[Array, "B"]
    deviation: Float[Array, "B"]

    def sum(self, x: Float[Array, "B"] | Bool[Array, "B"]) -> Float[Array, "B"]:
        """Returns the sum over the group's responses that have a reward."""
        return _group_sum(self.keep * x, self.ids)


def _groups(
    function: str,
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None,
    lengths: Int[Array, "B"] | None,
) -> _Groups:
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
    deviation = jnp.where(keep > 0, rewards - mean, 0.0)
    return _Groups(rewards, keep, group_ids, count, mean, highest, lowest, deviation)


def _group_sum(x: Float[Array, "B"], group_ids: Int[Array, "B"]) -> Float[Array, "B"]:
    return jax.ops.segment_sum(x, group_ids, num_segments=x.shape[0])[group_ids]
