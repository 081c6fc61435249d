"""A run's objective, as configured by gin: loss, corrections, advantages, penalties and reduction.

Functions are bound by reference, and their options are set under the function's own name:

    configs.Objective.loss = @objectives.gspo
    objectives.gspo.clip_high = 4e-4

A function of your own with the same signature therefore needs no registration.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxrl_stable import _moved
from jaxrl_stable.advantages import centered, conditions_of
from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.checks import bound_options, field_types, one_of, positive, within
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


def name_of(function: Callable) -> str:
    """Returns the name of a function, or of the function inside a `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function.__name__


@runtime_checkable
class ObjectiveLike(Protocol):
    """Interface that `update` requires: an `Objective`, or a choice between several."""

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
    ) -> tuple[Float[Array, ""], LossDetails]: ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the updates minimise; the defaults are MiniRL (https://arxiv.org/abs/2512.01374, eq. 7).

    Attributes:
      mini_batches: N, number of gradient steps per rollout batch.
      replay: routing that training replays: "none", "R2" (the training router's old choice) or
        "R3" (the sampler's choice).
      loss: a function from `objectives`, or any other with the same signature.
      corrections: functions from `corrections`; their factors are multiplied.
      advantages: a function from `advantages`.
      aggregation: one of `objectives.MODES`; "seq-mean-token-sum" is the paper's choice and
        "seq-mean-token-mean" its length-normalised ablation.
      horizon: constant length for "seq-mean-token-sum-norm"; None means `Reinforcement.max_tokens`.
      policies: which of the three policies the loss sees: "all" (decoupled: π_θ, π_old, μ_old),
        "recomputed" (π_old in place of μ_old: staleness is corrected, the mismatch is not) or
        "bypass" (μ_old in place of π_old: ratio and trust region are relative to the sampler).
        Metrics always see all three.
      kl_coefficient: β, weight of the KL penalty towards the initial policy. If 0, no copy of that
        policy is kept in memory. The copy does not replay any routing, as in verl and ROLL, so
        under replay the penalty is not exactly 0 even if the weights are equal.
      kl_estimator: one of `objectives.KL_ESTIMATORS`; see `kl_penalty`.
      kl_weighted: whether to multiply the KL penalty by π_θ/π_old, including the ratio's gradient
        ("k1" and "k3" only).
      entropy_coefficient: weight of the entropy bonus (entropy in nats per token).
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
        field_types(self)
        object.__setattr__(self, "corrections", tuple(self.corrections))
        one_of(self, "replay", REPLAYS)
        one_of(self, "aggregation", MODES)
        one_of(self, "policies", POLICIES)
        one_of(self, "kl_estimator", KL_ESTIMATORS)
        positive(self, "mini_batches")
        within(self, "horizon", above=0)
        within(self, "kl_coefficient", at_least=0)
        within(self, "entropy_coefficient")
        if self.kl_weighted and self.kl_estimator not in ("k1", "k3"):
            raise ValueError(
                f"Objective.kl_weighted makes kl_estimator={self.kl_estimator!r} biased; use 'k1' "
                "or 'k3'"
            )

    @property
    def needs_score(self) -> bool:
        """True if log π_old needs a separate scoring pass.

        Only a single update without replay and with `policies` "all" can do without it.
        """
        return self.needs_old_policy or self.replay != "none" or self.policies != "all"

    @property
    def needs_old_policy(self) -> bool:
        """True if updates would be wrong without log π_old from a scoring pass.

        With a single update per rollout, π_θ can replace π_old.
        """
        recomputed = self.policies == "recomputed"
        return self.mini_batches > 1 or self.replay == "R2" or recomputed

    @property
    def whole_batch(self) -> bool:
        """True if the loss or a correction needs all tokens of a mini-batch at once."""
        return any(traits_of(f).whole_batch for f in (self.loss, *self.corrections))

    def check_options(self) -> None:
        """Checks the types of options that are bound to the functions; raises ValueError if not."""
        for function in (self.loss, *self.corrections, self.advantages):
            bound_options(function)

    def check(self) -> None:
        """Checks that loss and corrections are compatible, then traces each (`try_functions`).

        Raises:
          ValueError: if an option has the wrong type, if the mismatch would be counted twice, if a
            function needs it but `policies` replaces it with 1, or if `try_functions` fails.
        """
        self.check_options()
        functions = (self.loss, *self.corrections)
        weights = [name_of(f) for f in functions if traits_of(f).weighs_mismatch]
        if len(weights) > 1:
            raise ValueError(
                f"Objective: {' and '.join(weights)} each weight by the mismatch between sampler "
                "and trainer, which would count twice; keep one and use masks for the rest"
            )
        needing = [name_of(f) for f in functions if traits_of(f).needs_mismatch]
        if needing and self.policies != "all":
            raise ValueError(
                f"Objective.policies={self.policies!r} removes the mismatch that "
                f"{', '.join(needing)} needs; set it to 'all' or choose another function"
            )
        self.try_functions()

    def try_functions(self) -> None:
        """Traces the functions on one response, so that errors appear before anything runs.

        Raises:
          ValueError: if a function rejects an option or has the wrong signature or result.
        """
        one, row = jax.ShapeDtypeStruct((1,), jnp.float32), (1, 2)
        mask, ids = jax.ShapeDtypeStruct(row, bool), jax.ShapeDtypeStruct((1,), jnp.int32)
        row, valid = jax.ShapeDtypeStruct(row, jnp.float32), jax.ShapeDtypeStruct((1,), bool)

        def tried(function: Callable, *arrays, **named) -> object:
            try:  # a new lambda avoids JAX's cached traces, which ignore changed gin settings
                return jax.eval_shape(lambda *x, **y: function(*x, **y), *arrays, **named)
            except Exception as error:
                if isinstance(error, ValueError):
                    raise
                kind = type(error).__name__
                raise ValueError(
                    f"Objective: {name_of(function)} raised {kind}: {error}"
                ) from error

        def check_result(function: Callable, got: object, expected: object) -> None:
            shapes = (jax.tree.map(lambda x: x.shape, tree) for tree in (got, expected))
            if jax.tree.structure(got) != jax.tree.structure(expected) or len(set(shapes)) > 1:
                raise ValueError(
                    f"Objective: {name_of(function)} returns {got} instead of {expected}"
                )

        arrays = row, row, row, one, mask
        for correction in self.corrections:
            check_result(correction, tried(correction, *arrays), row)
        check_result(self.loss, tried(self.loss, *arrays), TokenLoss(row, row, row, *[mask] * 3))
        named = {"penalty": one} if conditions_of(self.advantages).penalty == "separate" else {}
        check_result(self.advantages, tried(self.advantages, one, ids, valid, ids, **named), one)
        jax.eval_shape(lambda *x: aggregate(*x, self.aggregation, self.horizon), row, mask)

    def token_loss(
        self,
        logp: Float[Array, "B T"],
        logp_old: Float[Array, "B T"] | None,
        logp_rollout: Float[Array, "B T"],
        advantages: Float[Array, "B"] | Float[Array, "B T"],
        mask: Bool[Array, "B T"],
    ) -> tuple[TokenLoss, Float[Array, "B T"] | None]:
        """Computes the corrected loss per token.

        Returns:
          The loss after all corrections, and the product of their factors (None without
          corrections).
        """
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
    ) -> tuple[Float[Array, ""], LossDetails]:
        """Computes the loss to minimise, before it is divided by a count.

        Args:
          logp: log π_θ; carries a gradient.
          entropy: policy entropy at each response token; carries a gradient.
          batch: a `batch.TrainBatch`.

        Returns:
          The summed loss, and details for the metrics.
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
        return total, jax.lax.stop_gradient(LossDetails(total, count, out, factor, kl))


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossDetails:
    """Mini-batch values from which the metrics are computed.

    Attributes:
      total, count: sum of the loss, and its denominator.
      token_loss: loss per token, after corrections.
      factor: product of the corrections' factors, or None without corrections.
      kl: KL penalty per token, before the coefficient; None without a penalty.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    token_loss: TokenLoss
    factor: Float[Array, "B T"] | None
    kl: Float[Array, "B T"] | None


__getattr__ = _moved.moved_names("jaxrl_stable.objective")  # names that have moved
