"""One of several objectives, by an index that may be traced: runs of all are one program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_stable.objective import Decided, Objective, name_of


@dataclasses.dataclass(frozen=True)
class Choice:
    """Stands for an `Objective` in `update`, and decides by the one that `index` says.

    All of them are computed, which costs little: losses are arithmetic on `[B, T]`, beside passes
    of the model. Those that are not chosen get a cotangent of 0, and as every loss is bounded
    before its `exp`, 0 is what comes out of them.

    Attributes:
      objectives: agree in `program_of`.
      index: which of them.
    """

    objectives: tuple[Objective, ...]
    index: Int[Array, ""]

    def __getattr__(self, name: str) -> Any:
        """What they share: `replay`, `whole_batch`, `needs_old_policy`, …"""
        return getattr(self.objectives[0], name)

    def total(
        self, logp: Float[Array, "B T"], entropy: Float[Array, "B T"], batch: Any
    ) -> tuple[Float[Array, ""], Decided]:
        """See `Objective.total`."""
        decided = [objective.total(logp, entropy, batch) for objective in self.objectives]
        return jax.tree.map(lambda *x: jnp.stack(x)[self.index], *decided)


def program_of(objective: Objective) -> tuple:
    """What makes two objectives different programs: passes, replay, and the shape of results."""
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
