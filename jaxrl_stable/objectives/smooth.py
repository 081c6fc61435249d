"""SAPO and VESPO: smooth gates in place of a clip."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import LOG_RATIO_BOUND, bounded, log_ratio
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_shapes,
    per_response,
    per_token,
    repeated,
    score_function,
    staleness,
    traits,
)


def sapo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature_high: float = 1.0,
    temperature_low: float = 1.05,
) -> TokenLoss:
    """L_t = −(4/τ) σ( τ (r − 1) ) Â,  r = π_θ/π_old; τ = τ_high where Â > 0, else τ_low.

    Source: https://arxiv.org/abs/2511.20347. The weight on the gradient is 4 σ (1 − σ) r, which is
    1 at r = 1 and falls off on both sides. Published with `seq-mean-token-mean`.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      temperature_high, temperature_low: τ, positive; a larger τ makes a narrower gate.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if a temperature is not positive.
    """
    check_shapes("sapo", logp, logp_old, logp_rollout, advantages, mask)
    if not (temperature_high > 0 and temperature_low > 0):
        raise ValueError(
            f"sapo: temperature_high={temperature_high}, temperature_low={temperature_low}; "
            "use positive values"
        )
    advantages = per_token(advantages, mask)
    log_r = staleness(logp, logp_old, mask)
    r = jnp.exp(log_r)
    tau = jnp.where(advantages > 0, temperature_high, temperature_low).astype(r.dtype)
    gate = jax.nn.sigmoid(tau * (r - 1))
    weight, log_r = jax.lax.stop_gradient((4 * gate * (1 - gate) * r, log_r))
    nowhere = jnp.zeros_like(mask)
    return TokenLoss(-4 / tau * gate * advantages, log_r, weight, nowhere, nowhere, nowhere)


@traits(weighs_mismatch=lambda tis_cap, **_: tis_cap is not None)
def vespo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    tis_cap: float | None = None,
) -> TokenLoss:
    """L_t = −sg[ φ(W_i) ] Â log π_θ,  φ(W) = W^k e^{λ(1 − W)},  W_i = Π_t π_θ/π_old (token mean).

    Source: https://arxiv.org/abs/2602.10693. W is the product, not a mean: the paper reports that
    training collapses if W is normalised by length. φ(1) = 1, and φ decays towards 0 for small and
    for large W: log φ = λ + k log W − λ W. The defaults of (k, λ) are from the authors' code, whose
    docstring lists other values (2, 1.5, 4, 2.5).

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`.
      positive: (k, λ) where Â ≥ 0.
      negative: (k, λ) where Â < 0.
      tis_cap: C; if set, W is also multiplied by the truncated mismatch Π_t min(π_old/μ_old, C).
        If None, `logp_rollout` is unused.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if there is one advantage per token.
    """
    check_shapes("vespo", logp, logp_old, logp_rollout, advantages, mask)
    log_r = jax.lax.stop_gradient(staleness(logp, logp_old, mask))
    if tis_cap is not None:
        old = logp if logp_old is None else logp_old
        mismatch = jax.lax.stop_gradient(log_ratio(old, logp_rollout, mask))
        log_r += jnp.clip(mismatch, min=-LOG_RATIO_BOUND, max=math.log(tis_cap)) * mask
    log_W = repeated(log_r.sum(-1), mask)
    advantages = per_response(advantages, mask, "vespo")
    k, decay = (jnp.where(advantages >= 0, *pair) for pair in zip(positive, negative))
    weight = jnp.exp(decay + k * bounded(log_W) - decay * jnp.exp(bounded(log_W)))
    return score_function(logp, log_W, weight, advantages, mask)
