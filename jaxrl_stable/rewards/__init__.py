"""Reward functions; a response cannot make them run code, hang or crash the trainer."""

from jaxrl_stable.rewards.exact import exact_reward
from jaxrl_stable.rewards.numeric import numeric_reward, parse_number
from jaxrl_stable.rewards.overlong import overlong_penalty
from jaxrl_stable.rewards.reward import Reward, check_references, load_reward, try_reward
from jaxrl_stable.rewards.verdict import Status, Verdict

__all__ = [
    "Reward",
    "Status",
    "Verdict",
    "check_references",
    "exact_reward",
    "load_reward",
    "numeric_reward",
    "overlong_penalty",
    "parse_number",
    "try_reward",
]
