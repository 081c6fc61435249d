"""CISPO and MinPRO: the weight is clipped, and every token keeps its gradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_clip,
    check_shapes,
    per_token,
    score_function,
    staleness,
)


def cispo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
) -> TokenLoss:
    """L_t = −sg[ clip(r, 1 − ε_low, 1 + ε_high) ] Â log π_θ,  r = π_θ/π_old.

    Source: https://arxiv.org/abs/2506.13585, which gives no values for the bounds. The defaults are
    ScaleRL's (https://arxiv.org/abs/2510.13786): no lower bound, and an upper bound of 5, so
    ε_high = 4. Bounds here are relative to 1; TRL's `epsilon_high` is the absolute bound. Published
    with the token mean and std-normalised advantages.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      clip_low: ε_low, or None for no lower bound.
      clip_high: ε_high.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the clip bounds are invalid (0 < clip_low ≤ 1 or None, clip_high > 0).
    """
    check_shapes("cispo", logp, logp_old, logp_rollout, advantages, mask)
    check_clip("cispo", None if clip_low == 1 else clip_low, clip_high)
    log_r = jax.lax.stop_gradient(staleness(logp, logp_old, mask))
    return _clipped_weight(logp, log_r, advantages, mask, clip_low, clip_high)


def minpro(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
) -> TokenLoss:
    """CISPO with the smallest earlier ratio as the weight of the prefix.

        L_t = −sg[ clip( r_t · min_{s<t} r_s, 1 − ε_low, 1 + ε_high) ] Â log π_θ     (token mean)

    The exact off-policy gradient weights token t by Π_{s≤t} r_s (https://arxiv.org/abs/2601.22718).
    We have not checked the paper itself; the form follows two public write-ups that agree. They do
    not cover the first token, whose empty minimum is taken as 1 here. We do not know the paper's ε;
    the defaults are CISPO's.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      clip_low: ε_low, or None for no lower bound.
      clip_high: ε_high.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the clip bounds are invalid (0 < clip_low ≤ 1 or None, clip_high > 0).
    """
    check_shapes("minpro", logp, logp_old, logp_rollout, advantages, mask)
    check_clip("minpro", None if clip_low == 1 else clip_low, clip_high)
    log_r = jax.lax.stop_gradient(staleness(logp, logp_old, mask))
    so_far = jax.lax.cummin(jnp.where(mask, log_r, jnp.inf), axis=1)
    before = jnp.pad(so_far[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.inf)
    prefix = jnp.where(mask & jnp.isfinite(before), before, 0.0)
    return _clipped_weight(logp, log_r + prefix, advantages, mask, clip_low, clip_high)


def _clipped_weight(
    logp: Float[Array, "B T"],
    log_weight: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_low: float | None,
    clip_high: float,
) -> TokenLoss:
    lower = -math.inf if clip_low in (None, 1) else math.log1p(-clip_low)
    upper = math.log1p(clip_high)
    weight = jnp.exp(jnp.clip(log_weight, min=lower, max=upper))
    truncated = (log_weight < lower) | (log_weight > upper)
    return score_function(logp, log_weight, weight, per_token(advantages, mask), mask, truncated)
