"""PPO's clipped surrogate, which GRPO, Dr.GRPO and DAPO share."""

from __future__ import annotations

import math

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_clip,
    check_shapes,
    clipped_surrogate,
    per_token,
    staleness,
)


def ppo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """L_t = −min( r Â, clip(r, 1 − ε_low, 1 + ε_high) Â ),  r = π_θ/π_old.

    Source: https://arxiv.org/abs/1707.06347, eq. 7. Several papers share this token loss and differ
    in advantages and reduction (see `published`):

        GRPO     ε .2 / .2    Â = (R − mean) / std    seq-mean-token-mean      arXiv:2402.03300
        Dr.GRPO  ε .2 / .2    Â = R − mean            seq-mean-token-sum-norm  arXiv:2503.20783
        DAPO     ε .2 / .28   Â = (R − mean) / std    token-mean               arXiv:2503.14476

    PPO corrects only for staleness. To correct for the mismatch between sampler and trainer, add a
    correction such as `corrections.token_tis`; the result is decoupled PPO (arXiv:2110.00641).

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      clip_low, clip_high: ε_low, ε_high.
      dual_clip: c, upper bound on r where Â < 0 (arXiv:1912.09729; verl's default is 3), or None
        for no bound.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the clip bounds are invalid (0 < clip_low < 1, clip_high > 0, dual_clip > 1).
    """
    check_shapes("ppo", logp, logp_old, logp_rollout, advantages, mask)
    check_clip("ppo", clip_low, clip_high)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"ppo: dual_clip={dual_clip} must bound the ratio; use a value above 1")
    log_r, advantages = staleness(logp, logp_old, mask), per_token(advantages, mask)
    bounds = math.log1p(-clip_low), math.log1p(clip_high)
    return clipped_surrogate(log_r, advantages, mask, *bounds, dual_clip)
