"""How well the token-level objective approximates the sequence-level one on a batch."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.diagnostics.parts import Mean, Metrics, masked_mean, weighted_mean
from jaxrl_stable.importance import at_least_float32, bounded, log_ratio


def validity_metrics(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    tolerance: float = 0.1,
) -> Metrics:
    """Measures how well the token-level objective approximates the sequence-level one on a batch.

    The paper writes ρ_t = π_θ/μ_old = 1 + δ_t and drops products of δ's (arXiv:2512.01374, §2). The
    weight of a response is S = Π_t (1 + δ_t), and the approximation keeps only F = 1 + Σ_t δ_t:

        e   = (S − F) / max(1, S, |F|)      eq. 1 minus eq. 3, up to a constant without gradient
        g_t = |S − ρ_t| / max(1, S, ρ_t)    eq. 2 minus eq. 4, in the weight of token t's gradient

    The divisor is 1 where the approximation is good. Elsewhere it keeps e in [−1, 1.4] and g in
    [0, 1], so that no single response dominates. To leading order, e = Σ_{s<t} δ_s δ_t, which is of
    second order in δ, whereas the gradient error is of first order: g_t ≈ |Σ_{s≠t} δ_s|. With
    advantages A_i, one per response:

    - `validity/violating_share`: share of responses with |e| > `tolerance`
    - `validity/value_error`: Σ |A_i| |e_i| / Σ |A_i|
    - `validity/value_bias`: Σ A_i e_i / Σ |A_i|, positive if the token-level objective is too low.
      S − F has mean 0 over responses, so only its correlation with the reward causes a bias
    - `validity/gradient_error`: Σ |A_i| g_it / Σ |A_i| over the tokens of all responses
    - `validity/mismatch_…` and `validity/staleness_…`: the same metrics with π_old/μ_old and with
      π_θ/π_old in place of ρ_t (eq. 5), as if the other ratio were 1
    - `validity/interaction`: Σ |A_i| |e_i − e_i^mismatch − e_i^staleness| / Σ |A_i|, the part that
      neither ratio causes alone

    All weights are taken before truncation and clipping, even if the objective applies them. Under
    replay π is the policy with the replayed experts.

    Args:
      logp: log π_θ; no gradient is needed.
      logp_old: log π_old. None means that π_old is π_θ, so staleness is 0.
      logp_rollout: log μ_old, as the sampler recorded it.
      advantages: one per response.
      mask: True on response tokens; rows without any are not counted.
      tolerance: bound on |e| in `violating_share`.
    """
    responses = mask.any(-1)
    advantages = jnp.where(responses, at_least_float32(advantages), 0.0)
    size = jnp.abs(advantages)
    token_size = jnp.where(mask, size[:, None], 0.0)

    def errors(
        numerator: Float[Array, "B T"], denominator: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B"], Mean, Mean, Mean]:
        e, g = _first_order_errors(log_ratio(numerator, denominator, mask))
        share = masked_mean(jnp.abs(e) > tolerance, responses)
        return e, share, weighted_mean(jnp.abs(e), size), weighted_mean(g, token_size)

    old = logp if logp_old is None else logp_old
    e, share, value, gradient = errors(logp, logp_rollout)
    e_mismatch, mismatch_share, mismatch_value, mismatch_gradient = errors(old, logp_rollout)
    metrics = {
        "validity/violating_share": share,
        "validity/value_error": value,
        "validity/value_bias": Mean((advantages * e).sum(), size.sum()),
        "validity/gradient_error": gradient,
        "validity/mismatch_violating_share": mismatch_share,
        "validity/mismatch_value_error": mismatch_value,
        "validity/mismatch_gradient_error": mismatch_gradient,
    }
    if logp_old is None:
        return metrics
    e_staleness, staleness_share, staleness_value, staleness_gradient = errors(logp, logp_old)
    interaction = jnp.abs(e - e_mismatch - e_staleness)
    return metrics | {
        "validity/staleness_violating_share": staleness_share,
        "validity/staleness_value_error": staleness_value,
        "validity/staleness_gradient_error": staleness_gradient,
        "validity/interaction": weighted_mean(interaction, size),
    }


def _first_order_errors(
    log_weight: Float[Array, "B T"],
) -> tuple[Float[Array, "B"], Float[Array, "B T"]]:
    """Returns e and g as defined in `validity_metrics`; `log_weight` is 0 outside the mask.

    It subtracts S − 1, F − 1 and ρ − 1 rather than S, F and ρ, because float32 rounding of numbers
    near 1 would swamp the second-order terms.
    """
    product = jnp.expm1(bounded(log_weight.sum(-1)))
    delta = jnp.expm1(bounded(log_weight))
    first_order = delta.sum(-1)
    scale = jnp.maximum(1 + jnp.maximum(product, 0.0), jnp.abs(1 + first_order))
    product, value = product[:, None], (product - first_order) / scale
    gradient = jnp.abs(product - delta) / (1 + jnp.maximum(jnp.maximum(product, delta), 0.0))
    return value, gradient
