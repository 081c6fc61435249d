"""The objective of a run, as gin binds it: loss, advantages, corrections, terms and reduction.

Functions are bound by reference and configured where they are defined:

    configs.Objective.loss = @objectives.gspo
    objectives.gspo.clip_high = 4e-4

so that a function of one's own, with the same signature, needs no registration.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_stable.advantages import centered
from jaxrl_stable.corrections import correct
from jaxrl_stable.objectives import (
    KL_ESTIMATORS,
    MODES,
    TokenLoss,
    aggregate,
    kl_penalty,
    minirl,
    traits_of,
)

REPLAYS = ("none", "R2", "R3")
POLICIES = ("all", "recomputed", "bypass")


def one_of(config: Any, field: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError if a field of a config has another value than the allowed ones."""
    value = getattr(config, field)
    if value not in allowed:
        name = f"{type(config).__name__}.{field}"
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")


def name_of(function: Callable) -> str:
    """The name of a function, or of the one that it is a `functools.partial` of."""
    while isinstance(function, functools.partial):
        function = function.func
    return function.__name__


@runtime_checkable
class ObjectiveLike(Protocol):
    """What `update` needs of an objective; `Objective` has it, and so has a choice of several."""

    @property
    def replay(self) -> str: ...

    @property
    def kl_coefficient(self) -> float: ...

    @property
    def whole_batch(self) -> bool: ...

    @property
    def needs_old_policy(self) -> bool: ...

    def total(
        self, logp: Float[Array, "B T"], entropy: Float[Array, "B T"], batch: Any
    ) -> tuple[Float[Array, ""], Decided]: ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the updates minimise; the defaults are MiniRL (arXiv:2512.01374, eq. 7).

    Attributes:
      mini_batches: N, gradient steps per rollout batch.
      replay: routing replayed in training: "none", "R2" (the training router's old choice) or "R3"
        (the sampler's choice).
      loss: one of `objectives`, or any function of that signature.
      corrections: functions of `corrections`; their factors multiply.
      advantages: one of `advantages`.
      aggregation: one of `objectives.MODES`: "seq-mean-token-sum" is the paper,
        "seq-mean-token-mean" its length-normalised ablation.
      horizon: constant length of "seq-mean-token-sum-norm"; None is `Reinforcement.max_tokens`.
      policies: which of the three the loss sees: "all" (decoupled: π_θ, π_old, μ_old), "recomputed"
        (log π_old stands for log μ_old too: staleness is corrected, the mismatch is not) or
        "bypass" (log μ_old stands for log π_old too: ratio and trust region are to the sampler).
        Metrics always see all three.
      kl_coefficient: β of the distance to the policy that the run started from; 0 keeps no such
        policy in memory. It is scored on its own routes, as in verl and ROLL: under replay the
        distance is not quite 0 even where the weights are equal.
      kl_estimator: one of `objectives.KL_ESTIMATORS`; see `kl_penalty`.
      kl_weighted: multiply that distance by π_θ/π_old, gradient and all ("k1" and "k3" alone).
      entropy_coefficient: weight of the entropy (nats a token) that is rewarded.
    """

    mini_batches: int = 4
    replay: str = "R3"
    loss: Callable[..., TokenLoss] = minirl
    corrections: Sequence[Callable[..., Array]] = ()
    advantages: Callable[..., Array] = centered
    aggregation: str = "seq-mean-token-sum"
    horizon: float | None = None
    policies: str = "all"
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    kl_weighted: bool = False
    entropy_coefficient: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "corrections", tuple(self.corrections))
        one_of(self, "replay", REPLAYS)
        one_of(self, "aggregation", MODES)
        one_of(self, "policies", POLICIES)
        one_of(self, "kl_estimator", KL_ESTIMATORS)
        if self.mini_batches < 1:
            raise ValueError(
                f"Objective.mini_batches is {self.mini_batches}; it must be at least 1"
            )
        if self.kl_weighted and self.kl_estimator not in ("k1", "k3"):
            raise ValueError(
                f"Objective.kl_weighted biases kl_estimator={self.kl_estimator!r}; use 'k1' or 'k3'"
            )

    @property
    def needs_score(self) -> bool:
        """Whether π_old gets a pass of its own: not with one update and nothing to replay."""
        return self.needs_old_policy or self.replay != "none" or self.policies != "all"

    @property
    def needs_old_policy(self) -> bool:
        """Whether an update without that pass would be wrong; with one update π_θ is π_old."""
        recomputed = self.policies == "recomputed"
        return self.mini_batches > 1 or self.replay == "R2" or recomputed

    @property
    def whole_batch(self) -> bool:
        """Whether a function decides on all tokens of a mini-batch together."""
        return any(traits_of(f).whole_batch for f in (self.loss, *self.corrections))

    def check(self) -> None:
        """Whether the functions go together, and what `try_functions` finds.

        Raises:
          ValueError: the mismatch would count twice, or is 1 where a function looks at it.
        """
        functions = (self.loss, *self.corrections)
        weights = [name_of(f) for f in functions if traits_of(f).weighs_mismatch]
        if len(weights) > 1:
            raise ValueError(
                f"Objective: {' and '.join(weights)} both weigh the mismatch of sampler and "
                "trainer; it would count twice. Keep one, and correct by masks"
            )
        needing = [name_of(f) for f in functions if traits_of(f).needs_mismatch]
        if needing and self.policies != "all":
            raise ValueError(
                f"Objective.policies={self.policies!r} makes the mismatch 1 that "
                f"{', '.join(needing)} looks at; use 'all', or another function"
            )
        self.try_functions()

    def try_functions(self) -> None:
        """Traces the functions on one response, so that what is wrong fails before anything runs.

        Raises:
          ValueError: an option that a function refuses, another signature, another result.
        """
        one, row = jax.ShapeDtypeStruct((1,), jnp.float32), (1, 2)
        mask, ids = jax.ShapeDtypeStruct(row, bool), jax.ShapeDtypeStruct((1,), jnp.int32)
        row, valid = jax.ShapeDtypeStruct(row, jnp.float32), jax.ShapeDtypeStruct((1,), bool)

        def tried(function: Callable, *arrays) -> object:
            try:  # by a fresh function: jax remembers traces, and gin's settings are no part of it
                return jax.eval_shape(lambda *x: function(*x), *arrays)
            except Exception as error:
                if isinstance(error, ValueError):
                    raise
                kind = type(error).__name__
                raise ValueError(
                    f"Objective: {name_of(function)} raised {kind}: {error}"
                ) from error

        def check_shapes(function: Callable, got: object, expected: object) -> None:
            shapes = (jax.tree.map(lambda x: x.shape, tree) for tree in (got, expected))
            if jax.tree.structure(got) != jax.tree.structure(expected) or len(set(shapes)) > 1:
                raise ValueError(
                    f"Objective: {name_of(function)} gives {got}, where {expected} is expected"
                )

        arrays = row, row, row, one, mask
        for correction in self.corrections:
            check_shapes(correction, tried(correction, *arrays), row)
        check_shapes(self.loss, tried(self.loss, *arrays), TokenLoss(row, row, row, *[mask] * 3))
        check_shapes(self.advantages, tried(self.advantages, one, ids, valid, ids), one)
        jax.eval_shape(lambda *x: aggregate(*x, self.aggregation, self.horizon), row, mask)

    def token_loss(
        self,
        logp: Float[Array, "B T"],
        logp_old: Float[Array, "B T"] | None,
        logp_rollout: Float[Array, "B T"],
        advantages: Float[Array, "B"],
        mask: Bool[Array, "B T"],
    ) -> tuple[TokenLoss, Float[Array, "B T"] | None]:
        """The loss as corrected, and the factors of the corrections together, if there are any."""
        if self.policies == "recomputed":
            logp_rollout = logp_old
        elif self.policies == "bypass":
            logp_old = logp_rollout
        arrays = logp, logp_old, logp_rollout, advantages, mask
        out = self.loss(*arrays)
        if not self.corrections:
            return out, None
        factor = math.prod(correction(*arrays) for correction in self.corrections)
        return correct(out, factor), factor

    def total(
        self,
        logp: Float[Array, "B T"],
        entropy: Float[Array, "B T"],
        batch: Any,
    ) -> tuple[Float[Array, ""], Decided]:
        """What is minimised, before its division by a count, and what was decided on the way.

        Args:
          logp: log π_θ; carries a gradient.
          entropy: of the policy at each response token; carries a gradient.
          batch: a `batch.TrainBatch`.
        """
        mask = batch.response_mask
        out, factor = self.token_loss(
            logp, batch.logp_old, batch.logp_rollout, batch.advantages, mask
        )
        loss, kl = out.loss, None
        if self.kl_coefficient:
            old = logp if batch.logp_old is None else batch.logp_old
            old = old if self.kl_weighted else None
            kl = kl_penalty(logp, batch.logp_reference, mask, self.kl_estimator, old)
            loss += self.kl_coefficient * kl
        if self.entropy_coefficient:
            loss -= self.entropy_coefficient * entropy
        total, count = aggregate(loss, mask, self.aggregation, self.horizon)
        return total, jax.lax.stop_gradient(Decided(total, count, out, factor, kl))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decided:
    """What the metrics want to know of a mini-batch.

    Attributes:
      total, count: of the loss.
      token_loss: with the corrections.
      factor: of the corrections, if there are any.
      kl: penalty of each token before its coefficient, if there is one.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    token_loss: TokenLoss
    factor: Float[Array, "B T"] | None
    kl: Float[Array, "B T"] | None
