"""GSPO, LUSPO and GMPO: one ratio per response, the geometric mean of its token ratios."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import at_least_float32, response_mean
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_clip,
    check_option,
    check_shapes,
    clipped_surrogate,
    per_response,
    per_token,
    repeated,
    staleness,
)


def gspo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    form: str = "sequence",
) -> TokenLoss:
    """L_i = −min( s_i Â_i, clip(s_i, 1 − ε_low, 1 + ε_high) Â_i ), with one ratio s_i per response.

        s_i = (π_θ(y_i) / π_old(y_i))^(1/|y_i|) = exp( mean_t log r_t )
        token form:  s_it = sg[s_i] π_θ/sg[π_θ], clipped token by token (eqs. 13 and 14)

    Source: https://arxiv.org/abs/2507.18071, eqs. 5 and 7. This ratio needs ε as small as 3e-4 and
    4e-4: with PPO's ε, nothing is ever clipped. With these values, users report that 10 to 30 % of
    tokens are clipped, compared with .03 % for GRPO. Published with `seq-mean-token-mean` and
    std-normalised advantages. Both forms have the same gradient if all advantages of a response are
    equal.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      clip_low, clip_high: ε_low, ε_high.
      form: "sequence", or "token", which also accepts one advantage per token.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the form is unknown, the clip bounds are invalid (0 < clip_low < 1,
        clip_high > 0), or the sequence form gets one advantage per token.
    """
    check_shapes("gspo", logp, logp_old, logp_rollout, advantages, mask)
    check_option("gspo", "form", form, ("sequence", "token"))
    check_clip("gspo", clip_low, clip_high)
    log_s = repeated(response_mean(staleness(logp, logp_old, mask), mask), mask)
    if form == "token":
        advantages = per_token(advantages, mask)
        own = jnp.where(mask, at_least_float32(logp), 0.0)
        log_s = jax.lax.stop_gradient(log_s) + own - jax.lax.stop_gradient(own)
    else:
        advantages = per_response(advantages, mask, "gspo (form='sequence')")
    bounds = math.log1p(-clip_low), math.log1p(clip_high)
    return clipped_surrogate(log_s, advantages, mask, *bounds)


def luspo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 2e-3,
    clip_high: float = 2.5e-3,
) -> TokenLoss:
    """L_i = −|y_i| min( s_i Â_i, clip(s_i, 1 − ε_low, 1 + ε_high) Â_i ): GSPO times the length.

    Form and ε are from TRL and its documentation; we have not read the paper. Reduce it with
    `seq-mean-token-mean`.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      clip_low, clip_high: ε_low, ε_high.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the clip bounds are invalid (0 < clip_low < 1, clip_high > 0), or there is one
        advantage per token.
    """
    check_shapes("luspo", logp, logp_old, logp_rollout, advantages, mask)
    check_clip("luspo", clip_low, clip_high)
    advantages = per_response(advantages, mask, "luspo")
    log_s = repeated(response_mean(staleness(logp, logp_old, mask), mask), mask)
    out = clipped_surrogate(log_s, advantages, mask, math.log1p(-clip_low), math.log1p(clip_high))
    length = mask.sum(-1, keepdims=True, dtype=out.loss.dtype)
    return out._replace(loss=out.loss * length, weight=out.weight * length)


def gmpo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> TokenLoss:
    """L_i = −Â_i exp( mean_t d̃_t ): the geometric mean of individually clipped ratios.

        d = log π_θ/π_old,   d̃ = min(d, ε_high) if Â > 0, max(d, −ε_low) if Â < 0

    Source: https://arxiv.org/abs/2507.20673. Unlike in the other objectives, ε bounds the
    log-ratio. The form agrees with verl's `geo_mean` and with TRL. Reduce it with
    `seq-mean-token-mean`.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      clip_low, clip_high: ε_low, ε_high, positive.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if there is one advantage per token, or the bounds are not positive.
    """
    check_shapes("gmpo", logp, logp_old, logp_rollout, advantages, mask)
    if not (clip_low > 0 and clip_high > 0):
        raise ValueError(
            f"gmpo: clip_low={clip_low}, clip_high={clip_high} bound a log-ratio around 0; "
            "use positive values"
        )
    advantages = per_response(advantages, mask, "gmpo")
    d = staleness(logp, logp_old, mask)
    high = mask & (advantages > 0) & (d > clip_high)
    low = mask & (advantages < 0) & (d < -clip_low)
    clipped = jnp.where(high, clip_high, jnp.where(low, -clip_low, d))
    mean = jnp.exp(repeated(response_mean(clipped, mask), mask))
    log_weight = repeated(response_mean(d, mask), mask)
    log_weight, weight = jax.lax.stop_gradient((log_weight, mean))
    return TokenLoss(-advantages * mean, log_weight, weight, jnp.zeros_like(mask), high, low)
