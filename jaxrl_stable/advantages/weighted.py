"""Advantages that weight the difference from the group's mean by how hard the problems are."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_stable.advantages.conditions import with_conditions
from jaxrl_stable.advantages.groups import group_statistics
from jaxrl_stable.array_types import Array, Bool, Float, Int
from jaxrl_stable.objectives.token_loss import check_same_shape


@with_conditions(
    lowest=0.0,
    penalty="refused",
    instead="advantages.centered or advantages.standardized",
)
def maxrl(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "B"]:
    """Returns Â_i = (R_i − group mean) / (group mean + eps): maximum likelihood RL.

    Source: https://arxiv.org/abs/2602.02710. We have not read the paper; the form is from SkyRL's
    code. With rewards of 0 and 1, a problem with success rate p counts for 1/p, as in a likelihood.

    The formula interprets the mean as a success rate. A negative reward, such as a penalty or −1
    for a wrong answer, can move it to 0 or below: [1, −1, 0, 0] would give ±10⁶, and
    [1, −1, −1, −1] would penalise the correct answer. The source has no length penalty either. If
    all rewards are at least 0, no advantage exceeds G − 1.

    Args:
      rewards, group_ids, valid, lengths: see `centered`; rewards are at least 0.
      eps: added to the mean.

    Returns:
      One advantage per response; 0 where the reward is missing. NaN in a group with a negative
      reward: the function is pure and cannot raise; `check_rewards` can, on the host.
    """
    group = group_statistics("maxrl", rewards, group_ids, valid, lengths)
    advantages = group.deviation / (group.mean + eps)
    return jnp.where((group.keep > 0) & (group.lowest < 0), jnp.nan, advantages)


@with_conditions(penalty="separate")
def gpg(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    penalty: Float[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Returns Â_i = (R_i − group mean) · B / #{j: R_j ≠ 0}, as in GPG.

    Source: https://arxiv.org/abs/2504.02546, in the form of verl's code. The factor counts correct
    answers, so a wrong answer must have a reward of 0; with rewards of ±1, the factor is always 1.

    Args:
      rewards, group_ids, valid, lengths: see `centered`.
      penalty: length penalty. It is added to the rewards in the difference from the group's mean
        but not in the count, since a penalised wrong answer is not correct. If all rewards are 0,
        the factor is 1.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    check_same_shape("gpg", "B", rewards=rewards, penalty=penalty)
    total = rewards if penalty is None else rewards + penalty
    group = group_statistics("gpg", total, group_ids, valid, lengths)
    count, right = group.keep.sum(), (group.keep * (rewards != 0)).sum()
    return group.deviation * jnp.where(right > 0, count / jnp.maximum(right, 1.0), 1.0)


def clip_filter(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    *,
    cap: float = 3.0,
) -> Float[Array, "B"]:
    """Returns Â_i = (R_i − group mean) · min(cap, groups / groups with spread), as in CPGD.

    Source: https://arxiv.org/abs/2505.12504. We have not read the paper; the form is from siiRL's
    code. Groups of equal rewards have no gradient; the factor lets the other groups make up for
    them.

    Args:
      rewards, group_ids, valid, lengths: see `centered`.
      cap: largest factor.

    Returns:
      One advantage per response; 0 where the reward is missing.
    """
    group = group_statistics("clip_filter", rewards, group_ids, valid, lengths)
    spread = (group.keep > 0) & ~group.equal
    share = 1 / jnp.maximum(group.count, 1.0)  # sums to 1 over a group
    groups, informative = (group.keep * share).sum(), (spread * share).sum()
    return group.deviation * jnp.minimum(cap, groups / jnp.maximum(informative, 1.0))
