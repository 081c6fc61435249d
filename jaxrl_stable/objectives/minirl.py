"""MiniRL: importance-weighted, clipped REINFORCE (arXiv:2512.01374, eq. 7), with its ablations."""

from __future__ import annotations

import math

import jax

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import clip_masks, importance_weight, log_ratio
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_clip,
    check_option,
    check_shapes,
    per_token,
    score_function,
    traits,
)


@traits(
    weighs_mismatch=lambda weight, **_: weight != "none",
    needs_mismatch=lambda weight, **_: weight == "mismatch",
)
def minirl(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
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

    with ε_low = 0.2, ε_high = 0.27, C = 5 (https://arxiv.org/abs/2512.01374, eq. 7 and §4.2). The
    gradient flows only through the last log π_θ.

    Args:
      logp: log π_θ of the sampled tokens; carries the gradient.
      logp_old: log π_old. None means that π_old is π_θ (one update per rollout), so r_t is 1 and
        nothing is clipped.
      logp_rollout: log μ_old, as the sampler recorded it.
      advantages: one per response, or one per token; treated as constant.
      mask: response tokens, EOS included.
      clip: whether to apply M_t.
      clip_low: ε_low.
      clip_high: ε_high.
      clip_anchor: denominator of r_t: "old" (π_old, the paper) or "rollout" (μ_old, as
        arXiv:2602.04879 argues).
      weight: "full" (π_θ/μ_old), "mismatch" (π_old/μ_old only), or "none" (always 1; the paper's
        `wo_train-infer-is` ablation).
      truncation: C, or None for untruncated weights.

    Returns:
      The token loss, before `aggregate`. Only its `loss` carries a gradient.

    Raises:
      ValueError: if `weight` or `clip_anchor` is unknown, the clip bounds are invalid
        (0 < clip_low < 1, clip_high > 0), `truncation` is not positive, or shapes do not match.

    Example:
      One response of two tokens, with weights π_θ/μ_old of 2 and 8 and ratios r of 1 and 2. The
      first token has L = −2 · 1 · log ½; the second is clipped.

      >>> import jax.numpy as jnp
      >>> logp = jnp.log(jnp.array([[0.5, 0.8]]))
      >>> logp_old = jnp.log(jnp.array([[0.5, 0.4]]))
      >>> logp_rollout = jnp.log(jnp.array([[0.25, 0.1]]))
      >>> mask = jnp.array([[True, True]])
      >>> out = minirl(logp, logp_old, logp_rollout, jnp.array([1.0]), mask)
      >>> print(out.loss.round(3), out.weight.round(3), out.clipped_high)
      [[1.386 0.   ]] [[2. 5.]] [[False  True]]
    """
    check_shapes("minirl", logp, logp_old, logp_rollout, advantages, mask)
    check_option("minirl", "weight", weight, ("full", "mismatch", "none"))
    check_option("minirl", "clip_anchor", clip_anchor, ("old", "rollout"))
    check_clip("minirl", clip_low, clip_high)
    if truncation is not None and truncation <= 0:
        raise ValueError(f"minirl: truncation is {truncation}; use a positive value or None")
    constant = jax.lax.stop_gradient(logp)
    old = constant if logp_old is None else jax.lax.stop_gradient(logp_old)
    rollout = jax.lax.stop_gradient(logp_rollout)
    policies = {"full": (constant, rollout), "mismatch": (old, rollout), "none": (old, old)}
    log_weight = log_ratio(*policies[weight], mask)
    cap = math.inf if truncation is None else math.log(truncation)
    advantages, clipped = per_token(advantages, mask), None
    if clip:
        anchor = {"old": old, "rollout": rollout}[clip_anchor]
        trust = log_ratio(constant, anchor, mask)
        high, low = clip_masks(trust, advantages, mask, clip_low, clip_high)
        clipped = high | low
    return score_function(
        logp,
        log_weight,
        importance_weight(log_weight, truncation),
        advantages,
        mask,
        truncated=log_weight > cap,
        clipped=clipped,
    )
