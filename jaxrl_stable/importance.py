"""Importance weights between the three policies, and PPO's clip masks; arrays in, arrays out.

`logp` is log π_θ (current weights; carries the gradient), `logp_old` is log π_old (training
program, with the weights used for the rollout), and `logp_rollout` is log μ_old (recorded by the
sampler). The weight factors into two parts (https://arxiv.org/abs/2512.01374, eq. 5):

    π_θ / μ_old  =  π_old / μ_old  ×  π_θ / π_old
    log_weight   =  mismatch       +  staleness
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float, Shaped

# exp(20) = 4.9e8 exceeds any meaningful ratio but does not come near overflow in float32.
LOG_RATIO_BOUND = 20.0


def at_least_float32(x: Shaped[Array, "*n"]) -> Float[Array, "*n"]:
    """Casts to float32; keeps float64, which JAX uses only on request."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def bounded(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Clips a log-ratio to ±20, so that its exponential cannot overflow."""
    return jnp.clip(x, min=-LOG_RATIO_BOUND, max=LOG_RATIO_BOUND)


def response_mean(x: Shaped[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Returns the mean over each response's tokens; 0 for a row without tokens."""
    x = jnp.where(mask, at_least_float32(x), 0.0)
    return x.sum(-1) / jnp.maximum(mask.sum(-1, dtype=x.dtype), 1.0)


def log_ratio(
    numerator: Float[Array, "B T"], denominator: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Returns the log-ratio of two policies, at least in float32; exactly 0 outside the mask.

    Masking precedes any `exp`, so a value such as ±1e4 or NaN in padding reaches neither the loss
    nor the gradient. (Masking afterwards would leave 0 · inf in the backward pass.)
    """
    numerator = jnp.where(mask, at_least_float32(numerator), 0.0)
    denominator = jnp.where(mask, at_least_float32(denominator), 0.0)
    return numerator - denominator


def importance_weight(
    log_weight: Float[Array, "B T"], cap: float | None = None
) -> Float[Array, "B T"]:
    """Returns sg[min(exp(log_weight), cap)]: one-sided truncated importance sampling.

    Args:
      log_weight: log of the weight.
      cap: upper bound on the weight. If None, the weight is not truncated; clipping its log to ±20
        then only prevents overflow.
    """
    upper = LOG_RATIO_BOUND if cap is None else math.log(cap)
    weight = jnp.exp(jnp.clip(log_weight, min=-LOG_RATIO_BOUND, max=upper))
    return jax.lax.stop_gradient(weight)


def clip_masks(
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B 1"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    low: float,
    high: float,
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Returns masks of the tokens whose gradient is zero under PPO's clipping (M_t = 0).

        above:  A > 0 and r > 1 + high        below:  A < 0 and r < 1 − low

    Source: https://arxiv.org/abs/2512.01374, eq. 7. Ratios are compared in log space, where
    nothing can overflow.

    Args:
      log_ratio: log r, where r is the ratio that the trust region bounds.
      advantages: one per response, [B, 1], or one per token.
      mask: response tokens.
      low: ε_low, in (0, 1).
      high: ε_high, positive.

    Returns:
      (above, below).
    """
    above = mask & (advantages > 0) & (log_ratio > math.log1p(high))
    below = mask & (advantages < 0) & (log_ratio < math.log1p(-low))
    return above, below
