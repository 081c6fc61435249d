"""CPGD: clips the log-probability; the ratio never multiplies the gradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import at_least_float32
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_clip,
    check_shapes,
    per_token,
    staleness,
)


def cpgd(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    drift: float = 1e-3,
    drift_cap: float = 2.0,
) -> TokenLoss:
    """L_t = −Â ℓ̄ + α min( sg[r] − 1, cap ) log π_θ,  r = π_θ/π_old.

        ℓ̄ = min( log π_θ, log π_old + log(1 + ε_high) ) if Â > 0
            max( log π_θ, log π_old + log(1 − ε_low) )  else

    Source: https://arxiv.org/abs/2505.12504. The second term penalises policy drift: without the
    cap, its gradient is the gradient of k3 = r − 1 − log r. We have not checked the paper itself;
    form and constants are from siiRL's code. Implementations reduce the loss differently (token
    mean in siiRL, per response in LightRFT).

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      clip_low, clip_high: ε_low, ε_high.
      drift: α, weight of the drift penalty.
      drift_cap: largest factor on the gradient of the penalty, before α.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the clip bounds are invalid (0 < clip_low < 1, clip_high > 0).
    """
    check_shapes("cpgd", logp, logp_old, logp_rollout, advantages, mask)
    check_clip("cpgd", clip_low, clip_high)
    advantages = per_token(advantages, mask)
    log_r = staleness(logp, logp_old, mask)
    own = jnp.where(mask, at_least_float32(logp), 0.0)
    old = jax.lax.stop_gradient(own - log_r)
    high = mask & (advantages > 0) & (log_r > math.log1p(clip_high))
    low = mask & (advantages < 0) & (log_r < math.log1p(-clip_low))
    bounded = jnp.where(high, old + math.log1p(clip_high), own)
    bounded = jnp.where(low, old + math.log1p(-clip_low), bounded)
    log_r = jax.lax.stop_gradient(log_r)
    pull = drift * jnp.minimum(jnp.expm1(log_r), drift_cap)
    loss = -advantages * bounded + pull * own
    return TokenLoss(loss, log_r, jnp.ones_like(log_r), jnp.zeros_like(mask), high, low)
