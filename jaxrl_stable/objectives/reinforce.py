"""REINFORCE, and its off-policy relative DRO; neither weights by an importance ratio."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_shapes,
    per_token,
    score_function,
    staleness,
)


def reinforce(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> TokenLoss:
    """L_t = −Â log π_θ(y_t) (Williams 1992); exact if the samples come from π_θ.

    With `advantages.leave_one_out` and the token sum, this is RLOO
    (https://arxiv.org/abs/2402.14740).

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_old` and
        `logp_rollout` are unused.

    Returns:
      The token loss, before `aggregate`.
    """
    check_shapes("reinforce", logp, logp_old, logp_rollout, advantages, mask)
    zeros = jnp.zeros(mask.shape, per_token(advantages, mask).dtype)
    return score_function(logp, zeros, zeros + 1.0, per_token(advantages, mask), mask)


def dro(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    beta: float = 0.05,
) -> TokenLoss:
    """L_t = −( Â log π_θ − β/2 (log π_θ/π_old)² ): a penalty, not a clip, keeps r near 1.

    This is the token-level form of verl's `dro`, without the learned value function of direct
    reward optimisation (https://arxiv.org/abs/2405.19107). No default for β is published; ours is
    from verl's test.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      beta: β, weight of the quadratic penalty.

    Returns:
      The token loss, before `aggregate`.
    """
    check_shapes("dro", logp, logp_old, logp_rollout, advantages, mask)
    log_r = staleness(logp, logp_old, mask)
    plain = reinforce(logp, logp_old, logp_rollout, advantages, mask)
    loss = plain.loss + 0.5 * beta * jnp.square(log_r)
    return plain._replace(loss=loss, log_weight=jax.lax.stop_gradient(log_r))
