"""Metrics of the three policies, each with its formula, as parts that combine exactly.

A metric is a `Mean` (total, count), a `Max` or a `Sum`; micro-batches, mini-batches and devices
combine them without approximation, and `finalize` divides once at the end. Δ = log π_old − log
μ_old is the mismatch, s = log π_θ − log π_old the staleness, m the response mask; a token mean is
Σ m x / Σ m.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxrl_stable.importance import LOG_RATIO_BOUND, at_least_float32, log_ratio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Array, Bool, Float

    from jaxrl_stable.objectives.minirl import TokenLoss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """total / count; combines by addition."""

    total: Float[Array, "*n"]
    count: Float[Array, "*n"]

    def collapse(self) -> Mean:
        """Combines the entries of the leading axis."""
        return Mean(self.total.sum(0), self.count.sum(0))

    def value(self) -> Float[Array, "*n"]:
        # A count may be a sum of weights below 1; where nothing was counted the mean is 0.
        return self.total / jnp.where(self.count > 0, self.count, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """Largest value; combines by maximum."""

    maximum: Float[Array, "*n"]

    def collapse(self) -> Max:
        return Max(self.maximum.max(0))

    def value(self) -> Float[Array, "*n"]:
        return self.maximum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """Total; combines by addition."""

    total: Float[Array, "*n"]

    def collapse(self) -> Sum:
        return Sum(self.total.sum(0))

    def value(self) -> Float[Array, "*n"]:
        return self.total


Metrics = dict[str, Mean | Max | Sum]


def is_metric(x: object) -> bool:
    return isinstance(x, Mean | Max | Sum)


def masked_mean(x: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Mean:
    """Σ m x over Σ m."""
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    return Mean(x.sum(), mask.sum(dtype=jnp.float32))


def weighted_mean(x: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Mean:
    """Σ w x over Σ w; the weights are not negative."""
    return Mean((weight * x).sum(), weight.sum())


def masked_max(x: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Max:
    return Max(jnp.where(mask, x.astype(jnp.float32), -jnp.inf).max())


def collapse(metrics: Metrics) -> Metrics:
    """Combines metrics that were stacked along a leading axis (the output of a scan)."""
    return jax.tree.map(lambda m: m.collapse(), metrics, is_leaf=is_metric)


def merge(parts: list[Metrics]) -> Metrics:
    """Combines metrics of several mini-batches."""
    return collapse(jax.tree.map(lambda *x: jnp.stack(x), *parts))


def finalize(metrics: Metrics) -> dict[str, Float[Array, ""]]:
    """Divides, and derives what is a function of combined parts.

    - `weight/ess`: (mean w)² / mean w², the share of the tokens that an unweighted batch of equal
      variance would need (Kish 1965); 1 when all weights are equal
    - `experts/max_violation`: max over layers and experts of E · (share of the load) − 1; 0 when
      all experts get the same
    - `experts/idle_share`: share of experts that got no token
    """
    values = {name: metric.value() for name, metric in metrics.items()}
    if "weight/square_mean" in values:
        square = values.pop("weight/square_mean")
        values["weight/ess"] = values["weight/truncated_mean"] ** 2 / jnp.maximum(square, 1e-30)
    if "experts/load" in values:
        load = values.pop("experts/load")
        share = load / jnp.maximum(load.sum(-1, keepdims=True), 1.0)
        values["experts/max_violation"] = (share * load.shape[-1] - 1.0).max()
        values["experts/idle_share"] = (load == 0).mean()
    return values


def mismatch_metrics(
    logp_old: Float[Array, "B T"], logp_rollout: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Distance of sampler and trainer on the sampled tokens, as token means (nats).

    - `mismatch/kl_k1`: mean(−Δ), the paper's D_KL[μ_old ‖ π_old] (§4.2); unbiased, can be negative
    - `mismatch/kl_k3`: mean(e^Δ − 1 − Δ); same expectation, never negative, lower variance
    - `mismatch/abs_mean`, `mismatch/abs_max`: mean and max |Δ|
    - `mismatch/extreme_share`: mean 1[|Δ| > ln 2], F(2) of arXiv:2510.11370
    """
    delta = log_ratio(logp_old, logp_rollout, mask)
    bounded = jnp.clip(delta, min=-LOG_RATIO_BOUND, max=LOG_RATIO_BOUND)
    magnitude = jnp.abs(delta)
    return {
        "mismatch/kl_k1": masked_mean(-delta, mask),
        "mismatch/kl_k3": masked_mean(jnp.expm1(bounded) - bounded, mask),
        "mismatch/abs_mean": masked_mean(magnitude, mask),
        "mismatch/abs_max": masked_max(magnitude, mask),
        "mismatch/extreme_share": masked_mean(magnitude > math.log(2), mask),
    }


def staleness_metrics(
    logp: Float[Array, "B T"], logp_old: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Distance of the current policy from the one of the rollout, both in the training program.

    - `staleness/kl_k3`: mean(e^s − 1 − s)
    - `staleness/abs_mean`: mean |s|
    - `staleness/ratio_deviation_max`: max |π_θ/π_old − 1|; 0 but for rounding in the first
      mini-batch after `score`
    """
    s = log_ratio(logp, logp_old, mask)
    bounded = jnp.clip(s, min=-LOG_RATIO_BOUND, max=LOG_RATIO_BOUND)
    return {
        "staleness/kl_k3": masked_mean(jnp.expm1(bounded) - bounded, mask),
        "staleness/abs_mean": masked_mean(jnp.abs(s), mask),
        "staleness/ratio_deviation_max": masked_max(jnp.abs(jnp.expm1(bounded)), mask),
    }


def weight_metrics(loss: TokenLoss, mask: Bool[Array, "B T"], cap: float | None) -> Metrics:
    """Importance weights before and after truncation, and the clip's decisions, as token means.

    Here w is the weight that the objective uses: π_θ/μ_old, or what an ablation puts in its place.

    - `weight/raw_mean`, `weight/raw_max`: mean and max of w
    - `weight/truncated_mean`, `weight/truncated_max`: the same of min(w, C)
    - `weight/over_cap_share`: mean 1[w > C]
    - `weight/ess`: see `finalize`
    - `clip/high_share`, `clip/low_share`: share of tokens that M_t silences above and below
    """
    raw = jnp.exp(jnp.clip(loss.log_weight, min=-LOG_RATIO_BOUND, max=LOG_RATIO_BOUND))
    over = loss.log_weight > (math.inf if cap is None else math.log(cap))
    return {
        "weight/raw_mean": masked_mean(raw, mask),
        "weight/raw_max": masked_max(raw, mask),
        "weight/truncated_mean": masked_mean(loss.weight, mask),
        "weight/truncated_max": masked_max(loss.weight, mask),
        "weight/square_mean": masked_mean(jnp.square(loss.weight), mask),
        "weight/over_cap_share": masked_mean(over, mask),
        "clip/high_share": masked_mean(loss.clipped_high, mask),
        "clip/low_share": masked_mean(loss.clipped_low, mask),
    }


def validity_metrics(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    tolerance: float = 0.1,
) -> Metrics:
    """How far a batch is from where the token-level objective stands for the sequence-level one.

    The paper puts ρ_t = π_θ/μ_old = 1 + δ_t and drops the products of δ's (arXiv:2512.01374, §2).
    For one response, with its weight S = Π_t (1 + δ_t) and what is kept of it, F = 1 + Σ_t δ_t:

        e   = (S − F) / max(1, S, |F|)      eq. 1 less eq. 3, up to a constant without gradient
        g_t = |S − ρ_t| / max(1, S, ρ_t)    eq. 2 less eq. 4, in the weight of token t's gradient

    The divisor is 1 near the approximation; away from it, it keeps e in [−1, 1.4] and g in [0, 1],
    so that no single response decides. e is of second order, Σ_{s<t} δ_s δ_t. The gradient of that
    is of first order: g_t is about |Σ_{s≠t} δ_s|. With advantages A_i, one a response:

    - `validity/violating_share`: share of responses with |e| > tolerance
    - `validity/value_error`: Σ |A_i| |e_i| / Σ |A_i|
    - `validity/value_bias`: Σ A_i e_i / Σ |A_i|. S − F has mean 0 over responses, so that only its
      tie with the reward biases; positive where the token-level objective is too low
    - `validity/gradient_error`: Σ |A_i| g_it / Σ |A_i| over the tokens of all responses
    - `validity/mismatch_…` and `validity/staleness_…`: the same with π_old/μ_old and π_θ/π_old in
      the place of ρ_t (eq. 5), as if the other were 1
    - `validity/interaction`: Σ |A_i| |e_i − e_i^mismatch − e_i^staleness| / Σ |A_i|, what neither
      has alone

    The weights are those before truncation and clip, whatever the objective makes of them. Under
    replay π is the policy with the replayed experts.

    Args:
      logp: log π_θ, a constant here.
      logp_old: log π_old. None means that it is π_θ: there is no staleness.
      logp_rollout: log μ_old, as the sampler recorded it.
      advantages: one per sequence.
      mask: response tokens; a row without any counts nowhere.
      tolerance: of `violating_share`.
    """
    responses = mask.any(-1)
    advantages = jnp.where(responses, at_least_float32(advantages), 0.0)
    size = jnp.abs(advantages)
    token_size = jnp.where(mask, size[:, None], 0.0)

    def errors(numerator, denominator):
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
    """e and g of `validity_metrics`; `log_weight` is 0 outside the mask.

    Differences of S − 1, F − 1 and ρ − 1 rather than of S, F and ρ: what is of second order would
    drown in float32's rounding of numbers near 1.
    """
    bounded = lambda x: jnp.clip(x, min=-LOG_RATIO_BOUND, max=LOG_RATIO_BOUND)  # noqa: E731
    product = jnp.expm1(bounded(log_weight.sum(-1)))
    delta = jnp.expm1(bounded(log_weight))
    first_order = delta.sum(-1)
    scale = jnp.maximum(1 + jnp.maximum(product, 0.0), jnp.abs(1 + first_order))
    product, value = product[:, None], (product - first_order) / scale
    gradient = jnp.abs(product - delta) / (1 + jnp.maximum(jnp.maximum(product, delta), 0.0))
    return value, gradient


def routing_metrics(agreement: Float[Array, "L B T"], valid: Bool[Array, "B T"]) -> Metrics:
    """Agreement of the sampler's experts with the training router's own choice.

    Args:
      agreement: share of the K experts in common, of each layer and token (`routing.overlap`).
      valid: tokens that have a choice to compare.

    - `routing/agreement`: mean over layers and valid tokens
    - `routing/agreement_layer_XX`: the same of one MoE layer
    - `routing/differing_tokens_share`: share of tokens with at least one differing layer
      (94 % at 48 layers in arXiv:2510.11370)
    """
    if agreement.shape[0] == 0:
        return {}
    differs = (agreement < 1.0).any(0)
    return {
        "routing/agreement": masked_mean(agreement, jnp.broadcast_to(valid, agreement.shape)),
        "routing/differing_tokens_share": masked_mean(differs, valid),
        **{
            f"routing/agreement_layer_{i:02d}": masked_mean(layer, valid)
            for i, layer in enumerate(agreement)
        },
    }


def load_metrics(
    load: Float[Array, "L E"], confidence: Float[Array, "L B T"], real: Bool[Array, "B T"]
) -> Metrics:
    """Balance of the experts (see `finalize`) and decidedness of the routers.

    - `experts/confidence`: mean probability mass of the experts used
    """
    if load.shape[0] == 0:
        return {}
    everywhere = jnp.broadcast_to(real, confidence.shape)
    return {
        "experts/load": Sum(load),
        "experts/confidence": masked_mean(confidence, everywhere),
    }


def as_floats(values: Mapping[str, Array]) -> dict[str, float]:
    """One transfer to the host."""
    return {name: float(value) for name, value in jax.device_get(dict(values)).items()}
