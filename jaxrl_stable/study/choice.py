"""Selects an objective by a traced index, so that several objectives share one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_stable.objective import LossDetails, Objective, name_of


@dataclasses.dataclass(frozen=True)
class Choice:
    """An objective for `update` that computes several objectives and selects one by index.

    Computing all of them is cheap: a loss is arithmetic on `[B, T]` arrays, which costs little
    compared with a pass of the model. Losses that are not selected get a cotangent of 0. Every loss
    bounds its argument before `exp`, so their gradients are 0, never NaN.

    The properties mirror the fields and properties of `Objective` that a training step reads. They
    are equal for all objectives, because all objectives have the same `program_of`.

    Attributes:
      objectives: at least one; all have the same `program_of`.
      index: position of the selected objective; may be traced.
    """

    objectives: tuple[Objective, ...]
    index: Int[Array, ""]

    @property
    def mini_batches(self) -> int:
        return self.objectives[0].mini_batches

    @property
    def replay(self) -> str:
        return self.objectives[0].replay

    @property
    def advantages(self) -> Callable[..., Array]:
        return self.objectives[0].advantages

    @property
    def kl_coefficient(self) -> float:
        """The first objective's coefficient. Others may differ, but either all are 0 or none is."""
        return self.objectives[0].kl_coefficient

    @property
    def needs_score(self) -> bool:
        return self.objectives[0].needs_score

    @property
    def needs_old_policy(self) -> bool:
        return self.objectives[0].needs_old_policy

    @property
    def whole_batch(self) -> bool:
        return self.objectives[0].whole_batch

    def total(
        self, logp: Float[Array, "B T"], entropy: Float[Array, "B T"], batch: Any
    ) -> tuple[Float[Array, ""], LossDetails]:
        """Returns the result of `Objective.total` for the selected objective."""
        decided = [objective.total(logp, entropy, batch) for objective in self.objectives]
        return jax.tree.map(lambda *x: jnp.stack(x)[self.index], *decided)


def program_of(objective: Objective) -> tuple:
    """Returns a key that is equal for objectives that can share a program.

    The key covers the passes, the replay, and the shape of the results.
    """
    return (
        objective.mini_batches,
        objective.replay,
        objective.needs_score,
        objective.needs_old_policy,
        objective.whole_batch,
        bool(objective.corrections),
        bool(objective.kl_coefficient),
        name_of(objective.advantages),
    )
