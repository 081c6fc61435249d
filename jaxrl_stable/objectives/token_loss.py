"""What every objective returns, and the few steps that all of them share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_stable.importance import at_least_float32, bounded, log_ratio

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class TokenLoss(NamedTuple):
    """Per-token loss and what was decided on the way; everything but `loss` is constant.

    An objective whose ratio belongs to the response repeats the response's values in each of its
    tokens; the mean over the tokens is then the response's loss.

    Attributes:
      loss: to be minimised after `aggregate`; 0 outside the mask.
      log_weight: log of the importance ratio before any bound, 0 outside the mask.
      weight: what stands before −Â ∇log π_θ where nothing is clipped: the ratio after its bounds.
      truncated: tokens whose weight met a bound and keeps its gradient.
      clipped_high: tokens with Â > 0 whose gradient is silenced.
      clipped_low: the same with Â < 0.
    """

    loss: Float[Array, "B T"]
    log_weight: Float[Array, "B T"]
    weight: Float[Array, "B T"]
    truncated: Bool[Array, "B T"]
    clipped_high: Bool[Array, "B T"]
    clipped_low: Bool[Array, "B T"]


def per_token(
    advantages: Float[Array, "B"] | Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Advantages as constants of every token, 0 outside the mask; one a response is repeated."""
    advantages = jax.lax.stop_gradient(at_least_float32(advantages))
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    return jnp.where(mask, advantages, 0.0)


def per_response(
    advantages: Float[Array, "B"], mask: Bool[Array, "B T"], objective: str
) -> Float[Array, "B T"]:
    """The same for objectives whose ratio belongs to the response.

    Raises:
      ValueError: there is one advantage a token.
    """
    if advantages.ndim != 1:
        raise ValueError(
            f"{objective}: advantages have shape {advantages.shape}; its ratio belongs to the "
            "response, so give one a response, [B]"
        )
    return per_token(advantages, mask)


def staleness(
    logp: Float[Array, "B T"], logp_old: Float[Array, "B T"] | None, mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """log π_θ/π_old with the gradient of log π_θ; 0 everywhere if `logp_old` is None (π_old = π_θ).

    Bounded at ±20, against overflow alone.
    """
    old = logp if logp_old is None else logp_old
    return bounded(log_ratio(logp, jax.lax.stop_gradient(old), mask))


def repeated(x: Float[Array, "B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """What belongs to a response, in each of its tokens; 0 outside the mask."""
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
    """L_t = −sg[M_t w_t] Â log π_θ: the gradient flows through log π_θ alone.

    Args:
      logp: log π_θ.
      log_weight: log of the ratio before any bound.
      weight: w_t.
      advantages: one a token, 0 outside the mask.
      mask: response tokens.
      truncated: see `TokenLoss`; None for none.
      clipped: where M_t is 0; None for nowhere.
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

    The gradient flows through r. With `dual_clip` = c, L = min(L, −c Â) where Â < 0: r counts no
    more than c there (arXiv:1912.09729, eq. 5). Decided in log space, where float32 resolves
    bounds as near to 1 as GSPO's.

    Args:
      log_r: log r, bounded.
      advantages: one a token, 0 outside the mask.
      mask: response tokens.
      log_lower, log_upper: logs of the bounds of r.
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
    """Raises ValueError if `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{objective}: {option} {value!r} is unknown; use one of {allowed}")


def check_clip(objective: str, clip_low: float | None, clip_high: float) -> None:
    """Raises ValueError unless 1 − clip_low (None: no bound) and 1 + clip_high are around 1."""
    if not ((clip_low is None or 0 < clip_low < 1) and clip_high > 0):
        raise ValueError(
            f"{objective}: clip_low={clip_low}, clip_high={clip_high} are ε around a ratio of 1; "
            "use 0 < clip_low < 1 and clip_high > 0"
        )
