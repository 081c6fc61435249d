"""Per-token terms added to the loss: the KL penalty towards a reference policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import bounded, log_ratio
from jaxrl_stable.objectives.token_loss import check_option, check_same_shape, staleness

KL_ESTIMATORS = ("k1", "k2", "k3", "k3+")


def kl_penalty(
    logp: Float[Array, "B T"],
    logp_reference: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    estimator: str = "k3",
    logp_old: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Estimates KL(π_θ ‖ π_ref) per token, with d = log π_θ/π_ref of the sampled token.

        estimator   value            gradient wrt log π_θ   expected gradient, samples from π_θ
        k1          d                1                      0: no penalty
        k2          ½ d²             d                      unbiased
        k3          e^−d − 1 + d     1 − e^−d               gradient of KL(π_ref ‖ π_θ) instead
        k3+         e^−d − 1 + d     d                      unbiased (value of k3, gradient of k2)

    Source of the values: http://joschu.net/blog/kl-approx.html; GRPO
    (https://arxiv.org/abs/2402.03300, eq. 4) uses k3. All assume samples from π_θ. With `logp_old`,
    the estimate is multiplied by r = π_θ/π_old, and the gradient also flows through r. For k1 and
    k3, value and gradient are then unbiased for samples from π_old (TRL's
    `use_bias_correction_kl`; DeepSeek-V3.2, arXiv:2512.02556).

    Args:
      logp: log π_θ; carries the gradient.
      logp_reference: log π_ref; treated as constant.
      mask: response tokens.
      estimator: one of `KL_ESTIMATORS`.
      logp_old: log π_old, or None to leave the estimate unweighted.

    Returns:
      The estimate per token, 0 outside the mask. Reduce it like the loss.

    Raises:
      ValueError: if the estimator is unknown, or is "k2" or "k3+" (biased if weighted) and
        `logp_old` is given.
    """
    check_same_shape(
        "kl_penalty", "B T", logp=logp, logp_reference=logp_reference, logp_old=logp_old, mask=mask
    )
    check_option("kl_penalty", "estimator", estimator, KL_ESTIMATORS)
    if logp_old is not None and estimator not in ("k1", "k3"):
        raise ValueError(
            f"kl_penalty: estimator {estimator!r} times π_θ/π_old is biased; use 'k1' or 'k3'"
        )
    d = bounded(log_ratio(logp, jax.lax.stop_gradient(logp_reference), mask))
    k2, k3 = 0.5 * jnp.square(d), jnp.expm1(-d) + d
    values = {"k1": d, "k2": k2, "k3": k3, "k3+": jax.lax.stop_gradient(k3 - k2) + k2}
    value = values[estimator]
    return value if logp_old is None else jnp.exp(staleness(logp, logp_old, mask)) * value
