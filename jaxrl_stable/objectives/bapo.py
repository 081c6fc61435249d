"""BAPO: PPO whose clip bounds adapt until tokens with Â > 0 have a target share of the loss."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import LOG_RATIO_BOUND, at_least_float32
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_option,
    check_shapes,
    clipped_surrogate,
    per_token,
    staleness,
    traits,
)

Steps = tuple[float, float, float]  # start, end, step


@traits(whole_batch=True)
def bapo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    form: str = "paper",
    low: Steps = (0.6, 0.9, 0.02),
    high: Steps = (1.2, 3.0, 0.05),
    target: float = 0.4,
    dual_clip: float | None = None,
) -> TokenLoss:
    """L_t = −min( r Â, clip(r, c_low, c_high) Â ), with bounds searched for in each call.

        paper:  raise c_high, then c_low, until  Σ_{Â>0} μ |ℓ| / Σ μ |ℓ| ≥ target,
                ℓ = min( r Â, clip(r, c_low, c_high) Â ),  μ = μ_old(y_t)
        code:   raise c_low, then c_high, until  P / N ≥ target,
                P = Σ_{Â>0} min(r, c_high) Â,  N = Σ_{Â<0} max(r, c_low) |Â|

    Source: https://arxiv.org/abs/2510.18927. The published code uses c_low .6 to .8, c_high 1.2 to
    2, steps of .05, target 1 and dual_clip 3. If no bounds reach the target, the last ones are
    used.

    The two forms are different objectives. The paper's form follows a secondary source (target .4;
    the authors' README says .5), which is doubtful: as described there, raising c_low only adds to
    the negative side, so it never helps to reach the target. The code's form follows the authors'
    repository. Both search over all tokens in the call, so pass the whole mini-batch. Published
    with the token mean.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`. Only the paper's form uses
        `logp_rollout`.
      form: "paper" or "code".
      low, high: start, end and step of the absolute bounds c_low and c_high.
      target: share of positive tokens in the loss (paper), or their ratio to negative ones (code).
      dual_clip: see `ppo`.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the form is unknown, the bounds do not rise (0 < start ≤ end, step > 0), `low`
        does not end below 1, or `high` ends below 1.
    """
    check_shapes("bapo", logp, logp_old, logp_rollout, advantages, mask)
    check_option("bapo", "form", form, ("paper", "code"))
    for name, (start, end, step) in {"low": low, "high": high}.items():
        if not (0 < start <= end and step > 0) or (end >= 1) != (name == "high"):
            raise ValueError(
                f"bapo: {name}={(start, end, step)} must be a rising (start, end, step), "
                "positive, with low ending below 1 and high ending at 1 or above"
            )
    advantages = per_token(advantages, mask)
    log_r = staleness(logp, logp_old, mask)
    r, size = jax.lax.stop_gradient(jnp.exp(log_r)), jnp.abs(advantages)
    if form == "paper":
        rollout = jnp.where(mask, at_least_float32(jax.lax.stop_gradient(logp_rollout)), 0.0)
        size *= jnp.exp(jnp.clip(rollout, min=-LOG_RATIO_BOUND, max=0.0))
    up, down = jnp.where(advantages > 0, size, 0.0), jnp.where(advantages < 0, size, 0.0)
    counts = [math.ceil(round((end - start) / step, 6)) for start, end, step in (low, high)]
    first, second = (1, 0) if form == "paper" else (0, 1)

    def bounds(i):
        """Returns pair i of the search: one bound rises to its end, then the other."""
        taken = {first: jnp.minimum(i, counts[first]), second: jnp.maximum(i - counts[first], 0)}
        return tuple(
            jnp.minimum(start + step * taken[which].astype(r.dtype), end)
            for which, (start, end, step) in enumerate((low, high))
        )

    def falls_short(i):
        c_low, c_high = bounds(i)
        positive = (up * jnp.minimum(r, c_high)).sum()
        negative = (down * jnp.maximum(r, c_low)).sum()
        goal = target * (positive + negative if form == "paper" else negative)
        return (positive < goal) & (i < sum(counts))

    found = jax.lax.while_loop(falls_short, lambda i: i + 1, jnp.zeros((), jnp.int32))
    log_low, log_high = map(jnp.log, bounds(found))
    return clipped_surrogate(log_r, advantages, mask, log_low, log_high, dual_clip)
