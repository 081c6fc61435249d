"""CISPO and MinPRO: the weight is clipped and every token keeps its gradient."""

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
    """L_t = −sg[ clip(r, 1 − ε_low, 1 + ε_high) ] Â log π_θ,  r = π_θ/π_old (arXiv:2506.13585).

    That paper gives no value for the bounds. The defaults are ScaleRL's (arXiv:2510.13786): no
    lower bound, and an upper bound of 5, which is ε_high = 4. Bounds are relative here; TRL's
    `epsilon_high` is the absolute bound. Published with the token mean and std-normalised
    advantages.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; μ_old is not looked at.
      clip_low: ε_low, or None for no lower bound.
      clip_high: ε_high.

    Raises:
      ValueError: bounds that are none.
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
    """CISPO with the smallest earlier ratio as a stand-in for the weight of the prefix.

        L_t = −sg[ clip( r_t · min_{s<t} r_s, 1 − ε_low, 1 + ε_high) ] Â log π_θ     (token mean)

    The exact off-policy gradient weighs token t by Π_{s≤t} r_s (arXiv:2601.22718). Not fully known:
    the form is that of two public write-ups which agree, the PDF was not read; for the first token
    they say nothing (here the empty minimum is 1); the paper's ε are unknown, the defaults are
    CISPO's.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; μ_old is not looked at.
      clip_low: ε_low, or None for no lower bound.
      clip_high: ε_high.

    Raises:
      ValueError: bounds that are none.
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
