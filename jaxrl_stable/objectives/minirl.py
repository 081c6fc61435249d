"""MiniRL: importance-weighted, clipped REINFORCE (arXiv:2512.01374, eq. 7), with its ablations."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_stable.importance import at_least_float32, clip_masks, importance_weight, log_ratio

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class TokenLoss(NamedTuple):
    """Per-token loss and what was decided on the way; everything but `loss` is constant.

    Attributes:
      loss: to be minimised after `aggregate`; 0 outside the mask.
      log_weight: log of the importance weight before truncation, 0 outside the mask.
      weight: the truncated weight, clip mask not yet applied.
      clipped_high, clipped_low: tokens whose gradient the clip silenced.
    """

    loss: Float[Array, "B T"]
    log_weight: Float[Array, "B T"]
    weight: Float[Array, "B T"]
    clipped_high: Bool[Array, "B T"]
    clipped_low: Bool[Array, "B T"]


def minirl(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    *,
    clip: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.27,
    clip_anchor: str = "old",
    weight: str = "full",
    truncation: float | None = 5.0,
) -> TokenLoss:
    """MiniRL's per-token loss; reduce it with `aggregate` (token sum, sequence mean).

        L_t = −sg[ M_t · min(π_θ/μ_old, C) ] · Â · log π_θ(y_t)
        M_t = 0 if Â > 0 and r_t > 1 + ε_high, or Â < 0 and r_t < 1 − ε_low; else 1
        r_t = π_θ/π_old

    with ε_low = 0.2, ε_high = 0.27, C = 5 (arXiv:2512.01374, eq. 7 and §4.2). The gradient flows
    through the last log π_θ alone.

    Args:
      logp: log π_θ of the sampled tokens; carries the gradient.
      logp_old: log π_old. None means that π_old is π_θ (one update per rollout): ratio 1, no clip.
      logp_rollout: log μ_old, as the sampler recorded it.
      advantages: one per sequence; constants.
      mask: response tokens, EOS included.
      clip: apply M_t.
      clip_low: ε_low.
      clip_high: ε_high.
      clip_anchor: the policy that r_t is taken against: "old" (π_old, the paper) or "rollout"
        (μ_old, as arXiv:2602.04879 argues).
      weight: "full" (π_θ/μ_old), "mismatch" (π_old/μ_old only), or "none" (1: the
        `wo_train-infer-is` ablation).
      truncation: C, or None for untruncated weights.

    Raises:
      ValueError: unknown `weight` or `clip_anchor`.
    """
    constant = jax.lax.stop_gradient(logp)
    old = constant if logp_old is None else jax.lax.stop_gradient(logp_old)
    rollout = jax.lax.stop_gradient(logp_rollout)
    log_weights = {"full": (constant, rollout), "mismatch": (old, rollout), "none": (old, old)}
    anchors = {"old": old, "rollout": rollout}
    if weight not in log_weights:
        raise ValueError(f"weight {weight!r} is unknown; use one of {tuple(log_weights)}")
    if clip_anchor not in anchors:
        raise ValueError(f"clip_anchor {clip_anchor!r} is unknown; use one of {tuple(anchors)}")

    advantages = jax.lax.stop_gradient(at_least_float32(advantages))[:, None]
    log_weight = log_ratio(*log_weights[weight], mask)
    truncated = importance_weight(log_weight, truncation)
    trust = log_ratio(constant, anchors[clip_anchor], mask)
    high, low = clip_masks(trust, advantages, mask, clip_low, clip_high)
    if not clip:
        high, low = jnp.zeros_like(high), jnp.zeros_like(low)
    coefficient = jnp.where(high | low, 0.0, truncated * advantages)
    loss = -coefficient * jnp.where(mask, at_least_float32(logp), 0.0)
    return TokenLoss(loss, log_weight, truncated, high, low)
