"""Conditions that an advantage estimator declares for its rewards, and the checks that use them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jaxrl_stable.array_types import Array, Bool, Float, Int

F = TypeVar("F", bound=Callable)

PENALTIES = ("added", "separate", "refused")


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Conditions that an advantage estimator needs.

    Attributes:
      lowest, highest: range of rewards for which the formula is valid; None means no bound.
      penalty: how the estimator accepts a length penalty such as DAPO's: "added" to the rewards,
        "separate" in its keyword argument `penalty`, or "refused" because the formula interprets
        the reward as a score and its source has no penalty.
      instead: what to use if the conditions do not hold; completes an error message.
    """

    lowest: float | None = None
    highest: float | None = None
    penalty: str = "added"
    instead: str = "another estimator"

    def __post_init__(self):
        if self.penalty not in PENALTIES:
            raise ValueError(
                f"Conditions.penalty is {self.penalty!r}; use one of "
                f"{', '.join(map(repr, PENALTIES))}"
            )

    @property
    def bounds(self) -> str:
        """The range in words; "" without bounds."""
        low = [] if self.lowest is None else [f"at least {self.lowest:g}"]
        high = [] if self.highest is None else [f"at most {self.highest:g}"]
        return " and ".join(low + high)

    def outside(self, rewards: Float[np.ndarray, "B"]) -> Bool[np.ndarray, "B"]:
        """Marks the rewards outside the range."""
        low = -np.inf if self.lowest is None else self.lowest
        high = np.inf if self.highest is None else self.highest
        return (rewards < low) | (rewards > high)


def with_conditions(
    *,
    lowest: float | None = None,
    highest: float | None = None,
    penalty: str = "added",
    instead: str = "another estimator",
) -> Callable[[F], F]:
    """Declares the `Conditions` of the decorated estimator; `conditions_of` reads them.

    >>> @with_conditions(lowest=0.0)
    ... def share(rewards, group_ids, valid=None, lengths=None):
    ...     return rewards / rewards.sum()
    >>> check_rewards(share, np.array([0.5, -1.0]))
    Traceback (most recent call last):
    ValueError: share needs rewards of at least 0, but response 1 has -1; use another estimator, \
or change the reward
    """
    conditions = Conditions(lowest, highest, penalty, instead)

    def declare(function: F) -> F:
        function.conditions = conditions
        return function

    return declare


def conditions_of(estimator: Callable) -> Conditions:
    """Returns the conditions of an estimator, or of the function inside a `functools.partial`.

    An estimator without a declaration has the default `Conditions`, which accept all rewards.
    """
    while isinstance(estimator, functools.partial) and not hasattr(estimator, "conditions"):
        estimator = estimator.func
    return getattr(estimator, "conditions", Conditions())


def check_rewards(
    estimator: Callable,
    rewards: Float[np.ndarray, "B"],
    valid: Bool[np.ndarray, "B"] | None = None,
) -> None:
    """Checks, on the host, that rewards are in the range that an estimator declares.

    Args:
      estimator: an estimator of this package, or your own.
      rewards: one per response, without a length penalty.
      valid: False where the reward is missing; such rewards are not checked.

    Raises:
      ValueError: if a reward is outside the range; the error names the first one.
    """
    conditions, rewards = conditions_of(estimator), np.asarray(rewards)
    outside = conditions.outside(rewards)
    if valid is not None:
        outside &= np.asarray(valid)
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(
            f"{_name(estimator)} needs rewards of {conditions.bounds}, but response {first} has "
            f"{rewards[first]:g}; use {conditions.instead}, or change the reward"
        )


def check_penalty(estimator: Callable, field: str) -> None:
    """Checks that an estimator accepts a length penalty; `field` is the setting that enables it.

    Raises:
      ValueError: if the estimator refuses a penalty.
    """
    conditions = conditions_of(estimator)
    if conditions.penalty == "refused":
        raise ValueError(
            f"{field} adds a length penalty, but {_name(estimator)} reads the reward as a score "
            f"and has no penalty in its source; set it to 0, or use {conditions.instead}"
        )


def with_penalty(
    estimator: Callable[..., Array],
    scores: Float[Array, "B"],
    penalty: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Calls an estimator with scores and a length penalty, combined as the estimator declares.

    An estimator that refuses penalties gets only the scores; call `check_penalty` first.
    """
    how = conditions_of(estimator).penalty
    if how == "separate":
        return estimator(scores, group_ids, valid, lengths, penalty=penalty)
    rewards = scores + penalty if how == "added" else scores
    return estimator(rewards, group_ids, valid, lengths)


def compares_groups(estimator: Callable[..., Array]) -> bool:
    """Returns True if the group is the baseline: groups of one have advantage 0 for any reward.

    The answer depends on the estimator's options (`reinforce_plus_plus` with `baseline=False`
    compares the whole batch), so the estimator is tried on four groups of one.
    """
    conditions = conditions_of(estimator)
    low, high = conditions.lowest, conditions.highest
    low = low if low is not None else 0.0 if high is None else high - 1.0
    high = low + 1.0 if high is None else high
    rewards = (low + (high - low) * np.array([0.0, 1.0, 0.25, 1.0])).astype(np.float32)
    ids, valid = np.arange(4, dtype=np.int32), np.ones(4, bool)
    with jax.ensure_compile_time_eval():
        # A new lambda avoids JAX's cached traces, which ignore changed gin settings.
        tried = jax.jit(lambda *x: estimator(*x))(rewards, ids, valid, ids + 1)
    return not np.any(np.nan_to_num(np.asarray(tried)))


def check_group_size(estimator: Callable[..., Array], size: int, field: str) -> None:
    """Checks that groups are large enough for an estimator to tell responses apart.

    Args:
      estimator: the estimator.
      size: responses per prompt.
      field: name of the setting with that size, for the error.

    Raises:
      ValueError: if the size is 1 and the group is the baseline, so that nothing would be learned.
    """
    if size == 1 and compares_groups(estimator):
        raise ValueError(
            f"{field} is 1, but {_name(estimator)} compares the responses of a group: all "
            "advantages would be 0, so nothing would be learned; use at least 2, or "
            "advantages.reinforce_plus_plus with baseline = False"
        )


def _name(estimator: Callable) -> str:
    while isinstance(estimator, functools.partial):
        estimator = estimator.func
    return getattr(estimator, "__name__", repr(estimator))
