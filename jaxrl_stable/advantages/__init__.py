"""Advantages: from one reward per response to one advantage per response.

All share one signature, `f(rewards, group_ids, valid=None, lengths=None, *, …) -> advantages`.
Responses with equal ids answer the same prompt; ids are in [0, B). Where `valid` is False the
reward is missing (a checker that failed is not a wrong answer): such a response is excluded from
every statistic and gets advantage 0. If the group is the baseline, a group of one has advantage 0.

Rewards of a group that differ only by the rounding of float32 (`groups.ROUNDING`) count as equal,
so that no division can blow such a difference up.

What an estimator asks of the rewards, and how it takes the length penalty, is declared next to it
with `@with_conditions`. The functions themselves are pure and check shapes alone: in your own loop,
call `check_rewards` on the host before the update.
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
