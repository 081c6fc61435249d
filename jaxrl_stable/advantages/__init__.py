"""Advantage estimators: one reward per response in, one advantage per response out.

All share one signature, `f(rewards, group_ids, valid=None, lengths=None, *, …) -> advantages`.
Responses with equal ids answer the same prompt; ids are in [0, B). Where `valid` is False, the
reward is missing (a checker failed, which does not make the answer wrong). Such a response is
excluded from every statistic and gets advantage 0. If the group is the baseline, a group of one has
advantage 0.

Rewards in a group that differ only by float32 rounding (`groups.ROUNDING`) count as equal, so that
no division can blow up the difference.

An estimator declares with `@with_conditions` what it requires of the rewards and how it accepts a
length penalty. The functions themselves are pure and check only shapes: in your own loop, call
`check_rewards` on the host before the update.
"""

from jaxrl_stable.advantages.baselines import (
    centered,
    leave_one_out,
    reinforce_plus_plus,
    standardized,
)
from jaxrl_stable.advantages.conditions import (
    Conditions,
    check_group_size,
    check_penalty,
    check_rewards,
    compares_groups,
    conditions_of,
    with_conditions,
    with_penalty,
)
from jaxrl_stable.advantages.groups import group_statistics
from jaxrl_stable.advantages.weighted import clip_filter, gpg, maxrl

__all__ = [
    "Conditions",
    "centered",
    "check_group_size",
    "check_penalty",
    "check_rewards",
    "clip_filter",
    "compares_groups",
    "conditions_of",
    "gpg",
    "group_statistics",
    "leave_one_out",
    "maxrl",
    "reinforce_plus_plus",
    "standardized",
    "with_conditions",
    "with_penalty",
]
