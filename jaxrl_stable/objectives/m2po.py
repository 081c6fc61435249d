"""M2PO: drops outlier tokens until the second moment of the log-ratio is below a threshold."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import log_ratio
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_option,
    check_shapes,
    per_token,
    staleness,
    traits,
)


@traits(whole_batch=True, needs_mismatch=lambda moment, **_: moment == "mismatch")
def m2po(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    threshold: float = 0.04,
    moment: str = "mismatch",
) -> TokenLoss:
    """L_t = −M_t r Â,  r = π_θ/π_old; M drops the largest d² until the mean of the rest is below τ.

        mismatch:  d = log π_old/μ_old     (AReaL's code)
        full:      d = log π_θ/μ_old       (AReaL's documentation)

    Source: https://arxiv.org/abs/2510.01161. We have not checked the paper itself; the form is
    AReaL's, whose code and documentation define d differently. Neither gives τ; the default is our
    choice. Published with the token mean and std-normalised advantages. The moment is taken over
    all tokens in the call, so pass the whole mini-batch; tokens outside the mask are left out.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`.
      threshold: τ, positive.
      moment: "mismatch" or "full".

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the moment is unknown, or the threshold is not positive.
    """
    check_shapes("m2po", logp, logp_old, logp_rollout, advantages, mask)
    check_option("m2po", "moment", moment, ("mismatch", "full"))
    if threshold <= 0:
        raise ValueError(f"m2po: threshold is {threshold}; use a positive value")
    advantages = per_token(advantages, mask)
    log_r = staleness(logp, logp_old, mask)
    old = logp if logp_old is None or moment == "full" else logp_old
    d = jax.lax.stop_gradient(log_ratio(old, logp_rollout, mask))
    dropped = mask & ~_smallest_below(jnp.square(d), mask, threshold)
    r = jnp.exp(log_r)
    loss = jnp.where(dropped, 0.0, -r * advantages)
    log_r, r = jax.lax.stop_gradient((log_r, r))
    high, low = dropped & (advantages > 0), dropped & (advantages < 0)
    return TokenLoss(loss, log_r, r, jnp.zeros_like(mask), high, low)


def _smallest_below(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], threshold: float
) -> Bool[Array, "B T"]:
    """Marks as many entries in the mask as possible, smallest first, with mean < `threshold`."""
    flat = jnp.where(mask, x, jnp.inf).ravel()
    order = jnp.argsort(flat)
    mean = jnp.cumsum(flat[order]) / jnp.arange(1, flat.size + 1)
    # The mean of the smallest k grows with k, so those below the threshold come first.
    kept = jnp.zeros(flat.shape, bool).at[order].set(mean < threshold)
    return kept.reshape(x.shape)
