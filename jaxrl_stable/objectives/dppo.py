"""DPPO: a trust region that bounds a divergence instead of a ratio, anchored at the sampler."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import at_least_float32, importance_weight, log_ratio
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_option,
    check_shapes,
    per_token,
    score_function,
    traits,
)

TINY = 1e-8  # keeps the logarithms of the binary KL finite


@traits(weighs_mismatch=True)
def dppo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    divergence: str = "tv",
    threshold: float = 0.15,
    truncation: float | None = None,
) -> TokenLoss:
    """L_t = −sg[ M_t min(ρ, C) ] Â log π_θ,  ρ = π_θ/μ_old.

        M_t = 0 if D > δ and Â pushes further out (Â > 0 and ρ > 1, or Â < 0 and ρ < 1), else 1
        tv:  D = |π_θ(y_t) − μ_old(y_t)|
        kl:  D = p log p/q + (1 − p) log (1 − p)/(1 − q),  p = μ_old(y_t), q = π_θ(y_t)

    Source: https://arxiv.org/abs/2602.04879. Both divergences compare only "this token" with
    "any other token", which gives a lower bound on the full divergence. For rare tokens, a ratio
    says little and would often trigger clipping. A difference of probabilities says just as little,
    but lets the step through. The paper uses δ = .15 (study) or .2 (scaling) for tv and .05 for kl,
    and C = None (study) or 5 (scaling). Its top-20 variants need logits and are not implemented.

    Args:
      logp: log π_θ.
      logp_old: unused; the paper finds that the trust region must be anchored at the sampler.
      logp_rollout: log μ_old.
      advantages: one per response, or one per token.
      mask: response tokens.
      divergence: "tv" or "kl".
      threshold: δ.
      truncation: C, or None for untruncated weights.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the divergence is unknown, or the threshold or truncation is not positive.
    """
    check_shapes("dppo", logp, logp_old, logp_rollout, advantages, mask)
    check_option("dppo", "divergence", divergence, ("tv", "kl"))
    if threshold <= 0 or (truncation is not None and truncation <= 0):
        raise ValueError(
            f"dppo: threshold={threshold}, truncation={truncation}; use positive values"
        )
    constant, rollout = jax.lax.stop_gradient((logp, logp_rollout))
    log_weight = log_ratio(constant, rollout, mask)
    q, p = (jnp.exp(jnp.where(mask, at_least_float32(x), 0.0)) for x in (constant, rollout))
    distance = jnp.abs(p - q) if divergence == "tv" else _binary_kl(p, q)
    advantages = per_token(advantages, mask)
    outward = advantages * log_weight > 0
    cap = math.inf if truncation is None else math.log(truncation)
    return score_function(
        logp,
        log_weight,
        importance_weight(log_weight, truncation),
        advantages,
        mask,
        truncated=log_weight > cap,
        clipped=outward & (distance > threshold),
    )


def _binary_kl(p: Float[Array, "B T"], q: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns the KL divergence between Bernoulli distributions with parameters p and q."""

    def term(a: Float[Array, "B T"], b: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return a * (jnp.log(jnp.maximum(a, TINY)) - jnp.log(jnp.maximum(b, TINY)))

    return term(p, q) + term(1 - p, 1 - q)
