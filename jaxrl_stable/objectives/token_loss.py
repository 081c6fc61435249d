"""The result type and traits of objectives, and the steps they share.

An objective is a function `f(logp, logp_old, logp_rollout, advantages, mask, *, …) -> TokenLoss`.
Arrays are `[B, T]`, except that `advantages` may be `[B]`. A new objective needs no registration:
bind it as `configs.Objective.loss = @my_module.my_loss`. If it has traits, declare them with the
decorator `traits`. `minirl.py` is an example.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import at_least_float32, bounded, log_ratio

F = TypeVar("F", bound=Callable)


class TokenLoss(NamedTuple):
    """Per-token loss and the decisions behind it; only `loss` carries a gradient.

    An objective with one ratio per response repeats the response's values at each of its tokens;
    their mean over the tokens is then the response's loss.

    Attributes:
      loss: quantity to minimise after `aggregate`; 0 outside the mask.
      log_weight: log of the importance ratio before any bound; 0 outside the mask.
      weight: factor on −Â ∇log π_θ where nothing is clipped: the ratio after its bounds.
      truncated: tokens whose weight hit a bound but which keep their gradient.
      clipped_high: tokens with Â > 0 whose gradient is zeroed.
      clipped_low: tokens with Â < 0 whose gradient is zeroed.
    """

    loss: Float[Array, "B T"]
    log_weight: Float[Array, "B T"]
    weight: Float[Array, "B T"]
    truncated: Bool[Array, "B T"]
    clipped_high: Bool[Array, "B T"]
    clipped_low: Bool[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Traits:
    """Properties of an objective or a correction that decide what it can be combined with.

    A trait that depends on options is a function that takes them as keyword arguments.

    Attributes:
      weighs_mismatch: whether it multiplies the gradient by π_old/μ_old, which must happen only
        once.
      needs_mismatch: whether it has no effect, or a wrong one, if π_old/μ_old is replaced with 1.
      whole_batch: whether its decisions depend on all tokens of a mini-batch, so that it must see
        all of them.
    """

    weighs_mismatch: bool | Callable[..., bool] = False
    needs_mismatch: bool | Callable[..., bool] = False
    whole_batch: bool | Callable[..., bool] = False


def traits(
    *,
    weighs_mismatch: bool | Callable[..., bool] = False,
    needs_mismatch: bool | Callable[..., bool] = False,
    whole_batch: bool | Callable[..., bool] = False,
) -> Callable[[F], F]:
    """Declares the `Traits` of the decorated function; `traits_of` reads them.

    >>> @traits(weighs_mismatch=lambda weight, **_: weight != "none")
    ... def loss(logp, *, weight="full"):
    ...     return logp
    >>> traits_of(loss).weighs_mismatch
    True
    >>> traits_of(functools.partial(loss, weight="none")).weighs_mismatch
    False
    """

    def declare(function: F) -> F:
        function.traits = Traits(weighs_mismatch, needs_mismatch, whole_batch)
        return function

    return declare


def traits_of(function: Callable) -> Traits:
    """Returns the traits of a function as booleans, given the options that `partial`s bind.

    Unbound options take their defaults. Without the decorator `traits`, all traits are False.

    Raises:
      ValueError: if a trait is set as an attribute of the function, as in older versions.
    """
    bound = {}
    while isinstance(function, functools.partial):
        bound, function = function.keywords | bound, function.func
    old_style = [name for name in Traits.__dataclass_fields__ if hasattr(function, name)]
    if old_style:
        raise ValueError(
            f"{function.__name__}.{old_style[0]} is set as an attribute; decorate the function "
            f"with @objectives.traits({old_style[0]}=True) instead"
        )
    declared = getattr(function, "traits", Traits())
    if not any(map(callable, vars(declared).values())):
        return declared
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty} | bound
    return Traits(*(x(**options) if callable(x) else x for x in vars(declared).values()))


def check_same_shape(function: str, axes: str, **arrays: Array | None) -> None:
    """Checks that arrays have equal shapes, so none would be broadcast; also works while tracing.

    Args:
      function: name of the caller, for the error message.
      axes: expected axes, such as "B T"; with a "*", any number of axes is allowed.
      **arrays: arrays by argument name; None is skipped.

    Raises:
      ValueError: if the arrays differ in shape or have the wrong number of axes.
    """
    shapes = {name: np.shape(x) for name, x in arrays.items() if x is not None}
    first = next(iter(shapes.values()))
    rank_differs = "*" not in axes and len(first) != len(axes.split())
    if rank_differs or any(shape != first for shape in shapes.values()):
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        expected = ", ".join(axes.split())
        raise ValueError(f"{function}: arrays must all have shape [{expected}] but are {shown}")


def check_shapes(
    function: str,
    logp: Array,
    logp_old: Array | None,
    logp_rollout: Array | None,
    advantages: Array,
    mask: Array,
) -> None:
    """Checks the shapes of the arrays that every objective and correction takes.

    Raises:
      ValueError: if advantages are neither [B] nor [B, T], or another array is not [B, T].
    """
    per_token = {"logp_old": logp_old, "logp_rollout": logp_rollout, "mask": mask}
    check_same_shape(function, "B T", logp=logp, **per_token)
    if np.shape(advantages) not in (np.shape(logp)[:1], np.shape(logp)):
        raise ValueError(
            f"{function}: advantages must have one value per response, [B], or per token, [B, T], "
            f"but are {list(np.shape(advantages))} where logp is {list(np.shape(logp))}"
        )


def per_token(
    advantages: Float[Array, "B"] | Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Broadcasts advantages to tokens, as constants; 0 outside the mask."""
    advantages = jax.lax.stop_gradient(at_least_float32(advantages))
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    return jnp.where(mask, advantages, 0.0)


def per_response(
    advantages: Float[Array, "B"], mask: Bool[Array, "B T"], objective: str
) -> Float[Array, "B T"]:
    """Like `per_token`, for objectives with one ratio per response.

    Raises:
      ValueError: if there is one advantage per token.
    """
    if advantages.ndim != 1:
        raise ValueError(
            f"{objective}: advantages have shape {list(advantages.shape)}, but there is one ratio "
            "per response; pass one advantage per response, [B]"
        )
    return per_token(advantages, mask)


def staleness(
    logp: Float[Array, "B T"], logp_old: Float[Array, "B T"] | None, mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Returns log π_θ/π_old with the gradient of log π_θ; 0 if `logp_old` is None (π_old = π_θ).

    The log-ratio is clipped to ±20, only to avoid overflow.
    """
    old = logp if logp_old is None else logp_old
    return bounded(log_ratio(logp, jax.lax.stop_gradient(old), mask))


def repeated(x: Float[Array, "B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Repeats one value per response at each of its tokens; 0 outside the mask."""
    return jnp.where(mask, x[:, None], 0.0)


def score_function(
    logp: Float[Array, "B T"],
    log_weight: Float[Array, "B T"],
    weight: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    truncated: Bool[Array, "B T"] | None = None,
    clipped: Bool[Array, "B T"] | None = None,
) -> TokenLoss:
    """L_t = −sg[M_t w_t] Â log π_θ: the gradient flows only through log π_θ.

    Args:
      logp: log π_θ.
      log_weight: log of the ratio before any bound.
      weight: w_t.
      advantages: one per token, 0 outside the mask.
      mask: response tokens.
      truncated: see `TokenLoss`; None if no weight is truncated.
      clipped: tokens where M_t is 0; None if M_t is 1 everywhere.
    """
    nowhere = jnp.zeros_like(mask)
    truncated = nowhere if truncated is None else truncated & mask
    clipped = nowhere if clipped is None else clipped & mask
    log_weight, weight = jax.lax.stop_gradient((log_weight, weight))
    coefficient = jnp.where(clipped, 0.0, weight * advantages)
    loss = -coefficient * jnp.where(mask, at_least_float32(logp), 0.0)
    high, low = clipped & (advantages > 0), clipped & (advantages < 0)
    return TokenLoss(loss, log_weight, weight, truncated & ~clipped, high, low)


def clipped_surrogate(
    log_r: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    log_lower: Float[Array, ""] | float,
    log_upper: Float[Array, ""] | float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """PPO's pessimistic bound: L = −min(r Â, clip(r, lower, upper) Â) (arXiv:1707.06347, eq. 7).

    The gradient flows through r. With `dual_clip` = c, L = min(L, −c Â) where Â < 0, which
    caps r at c there (arXiv:1912.09729, eq. 5). Clipping is decided in log space, where float32
    resolves even bounds as close to 1 as GSPO's.

    Args:
      log_r: log r, bounded.
      advantages: one per token, 0 outside the mask.
      mask: response tokens.
      log_lower, log_upper: logs of the bounds on r.
      dual_clip: c > 1, or None.
    """
    high = mask & (advantages > 0) & (log_r > log_upper)
    low = mask & (advantages < 0) & (log_r < log_lower)
    r = jnp.exp(log_r)
    clipped = jnp.where(high, jnp.exp(log_upper), jnp.where(low, jnp.exp(log_lower), r))
    if dual_clip is not None:
        over = mask & (advantages < 0) & (log_r > math.log(dual_clip))
        clipped, low = jnp.where(over, dual_clip, clipped), low | over
    log_r, r = jax.lax.stop_gradient((log_r, r))
    return TokenLoss(-clipped * advantages, log_r, r, jnp.zeros_like(mask), high, low)


def check_option(objective: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Checks that `value` is one of `allowed`; raises ValueError if not."""
    if value not in allowed:
        raise ValueError(f"{objective}: {option} {value!r} is unknown; use one of {allowed}")


def check_clip(objective: str, clip_low: float | None, clip_high: float) -> None:
    """Checks that 1 − clip_low (None: no bound) < 1 < 1 + clip_high; raises ValueError if not."""
    if not ((clip_low is None or 0 < clip_low < 1) and clip_high > 0):
        raise ValueError(
            f"{objective}: clip_low={clip_low}, clip_high={clip_high} bound the ratio to "
            "[1 - clip_low, 1 + clip_high]; use 0 < clip_low < 1 and clip_high > 0"
        )
