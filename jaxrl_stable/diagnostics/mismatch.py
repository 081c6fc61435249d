"""Distances between sampler and trainer, and between the current and the rollout's policy.

On the sampled tokens, Δ = log π_old − log μ_old is the mismatch and s = log π_θ − log π_old is the
staleness. The trainer assigns probability p = exp(log π_old) to a sampled token, and the sampler
assigns q = exp(log μ_old). The suffix of a name says how values are reduced:

    token_mean     mean over all response tokens in the batch; long responses count for more
    seq_mean       mean over responses, after a mean (or product) over each response's tokens
    max, min, std  over the same values; std is the population standard deviation

Frameworks use the same names for different quantities: for the same batch, the "KL" was 0.0074 in
verl and 0.0097 in slime. Each entry therefore lists in square brackets which frameworks record the
quantity, and under which name. Before every `exp`, Δ and its mean or sum over a response are
clipped to ±20. Rows without response tokens are not counted.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.diagnostics.parts import (
    Mean,
    Metrics,
    masked_correlation,
    masked_max,
    masked_mean,
    masked_min,
    masked_spread,
)
from jaxrl_stable.importance import at_least_float32, bounded, log_ratio, response_mean


def k3(log_ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns e^x − 1 − x, with x clipped to ±20.

    For x = log p − log q on samples from q, it is an unbiased, non-negative estimate of KL(q ‖ p).
    """
    x = bounded(log_ratio)
    return jnp.expm1(x) - x


def mismatch_metrics(
    logp_old: Float[Array, "B T"], logp_rollout: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Returns all metrics of `token_mismatch`, `response_mismatch` and `probability_mismatch`.

    `finalize` adds `mismatch/kl_entropy_ratio`.
    """
    return {
        **token_mismatch(logp_old, logp_rollout, mask),
        **response_mismatch(logp_old, logp_rollout, mask),
        **probability_mismatch(logp_old, logp_rollout, mask),
    }


def token_mismatch(
    logp_old: Float[Array, "B T"], logp_rollout: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Returns metrics over all response tokens. Means are over tokens; divergences are in nats.

    - `mismatch/kl_k1_token_mean`: mean(−Δ), the paper's D_KL[μ_old ‖ π_old] (arXiv:2512.01374,
      §4.2). It is unbiased and can be negative [verl, ms-swift: `kl`]
    - `mismatch/kl_k3_token_mean`: mean(e^Δ − 1 − Δ). It has the same expectation and a lower
      variance, and is never negative [verl, ms-swift: `k3_kl`; prime-rl: `mismatch_kl`; AReaL:
      `rollout_train_k3_kl`; NeMo-RL: `gen_kl_error`]
    - `mismatch/kl_k3_reverse_token_mean`: mean(e^−Δ − 1 + Δ). This is not the reverse KL, which
      would need samples from π_old. A single token whose probability under the sampler is far too
      high can dominate it [NeMo-RL: `policy_kl_error`]
    - `mismatch/js_token_mean`: mean(ln cosh(Δ/2)) [NeMo-RL: `js_divergence_error`, written there as
      half the sum of k3 for p and k3 for q, both against m = (p + q)/2, on the sampled token]
    - `mismatch/mult_prob_error_token_mean`: mean(e^|Δ|), which is 1 if p = q. NeMo-RL's limit for
      it is 1.05, or 1.02 under replay [NeMo-RL: `token_mult_prob_error`]
    - `mismatch/abs_token_mean`, `…_max`, `…_min`, `…_std`: statistics of |Δ| [SkyRL:
      `rollout_train_logprobs_abs_diff_…`; TRL: `sampling_logp_difference/…`; slime, miles:
      `train_rollout_logprob_abs_diff`]
    - `mismatch/extreme_share`: mean(1[|Δ| > ln 2]), which is F(2) in arXiv:2510.11370 [AReaL:
      `extreme_frac_tau2`]
    - `mismatch/chi2_token_mean`: mean(e^{2Δ}) − 1, the variance of e^Δ if its mean is 1 [verl,
      ms-swift: `chi2_token`]
    - `mismatch/ratio_token_mean`: mean(e^Δ), whose expectation is 1 [NeMo-RL:
      `sampling_importance_ratio`]
    """
    delta = log_ratio(logp_old, logp_rollout, mask)
    x, size = bounded(delta), jnp.abs(delta)
    # ln cosh(x/2) via cosh(2y) = 1 + 2 sinh² y, which keeps precision for small x.
    js = jnp.log1p(2.0 * jnp.square(jnp.sinh(x / 4.0)))
    return {
        "mismatch/kl_k1_token_mean": masked_mean(-delta, mask),
        "mismatch/kl_k3_token_mean": masked_mean(k3(delta), mask),
        "mismatch/kl_k3_reverse_token_mean": masked_mean(k3(-delta), mask),
        "mismatch/js_token_mean": masked_mean(js, mask),
        "mismatch/mult_prob_error_token_mean": masked_mean(jnp.exp(jnp.abs(x)), mask),
        "mismatch/abs_token_mean": masked_mean(size, mask),
        "mismatch/abs_token_max": masked_max(size, mask),
        "mismatch/abs_token_min": masked_min(size, mask),
        "mismatch/abs_token_std": masked_spread(size, mask),
        "mismatch/extreme_share": masked_mean(size > math.log(2), mask),
        "mismatch/chi2_token_mean": masked_mean(jnp.expm1(2.0 * x), mask),
        "mismatch/ratio_token_mean": masked_mean(jnp.exp(x), mask),
    }


def response_mismatch(
    logp_old: Float[Array, "B T"], logp_rollout: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Returns metrics over responses.

    mean_t is the mean over a response's tokens; mean_i is the mean over responses.

    - `mismatch/kl_k1_seq_mean`: mean_i mean_t(−Δ). This is also the mean difference in log
      perplexity, trainer minus sampler [slime: `kl`; verl, ms-swift, slime: `log_ppl_diff`]
    - `mismatch/kl_k3_seq_mean`: mean_i mean_t(e^Δ − 1 − Δ) [slime: `k3_kl`]
    - `mismatch/log_ppl_diff_abs_seq_mean`: mean_i |mean_t Δ| [verl, ms-swift, slime:
      `log_ppl_abs_diff`]
    - `mismatch/log_ppl_diff_seq_max`, `…_seq_min`: largest and smallest mean_t(−Δ) [verl, ms-swift:
      `log_ppl_diff_max`, `log_ppl_diff_min`]
    - `mismatch/ppl_train_seq_mean`: mean_i exp(−mean_t log π_old) [verl, ms-swift, slime:
      `training_ppl`]
    - `mismatch/ppl_rollout_seq_mean`: mean_i exp(−mean_t log μ_old) [verl, ms-swift, slime:
      `rollout_ppl`]
    - `mismatch/ppl_ratio_seq_mean`: mean_i exp(−mean_t Δ), which is not the quotient of the two
      means above [verl, ms-swift, slime: `ppl_ratio`]
    - `mismatch/chi2_token_seq_mean`: mean_i mean_t(e^{2Δ}) − 1 [slime: `chi2_token`]
    - `mismatch/chi2_seq_product`: mean_i exp(2 Σ_t Δ) − 1 [verl, slime: `chi2_seq`]
    - `mismatch/chi2_seq_geometric`: mean_i exp(2 mean_t Δ) − 1 [ms-swift: `chi2_seq`, which differs
      from the quantity of that name in verl]
    - `mismatch/ratio_token_seq_mean`: mean_i mean_t e^Δ [ROLL: `train_infer_ratio_token`]
    - `mismatch/ratio_geometric_seq_mean`: mean_i exp(mean_t Δ) [ROLL:
      `train_infer_ratio_geometric`, and `…_segment`, the geometric mean per turn; here a response
      is a single turn]
    - `mismatch/ratio_product_seq_mean`: mean_i exp(Σ_t Δ) [ROLL: `train_infer_ratio_sequence`]
    """
    delta = log_ratio(logp_old, logp_rollout, mask)
    responses = mask.any(-1)
    mean, total = bounded(response_mean(delta, mask)), bounded(delta.sum(-1))
    x, difference = bounded(delta), -response_mean(delta, mask)

    def over_responses(x: Float[Array, "B"]) -> Mean:
        return masked_mean(x, responses)

    def perplexity(logp: Float[Array, "B T"]) -> Float[Array, "B"]:
        return jnp.exp(bounded(-response_mean(at_least_float32(logp), mask)))

    return {
        "mismatch/kl_k1_seq_mean": over_responses(difference),
        "mismatch/kl_k3_seq_mean": over_responses(response_mean(k3(delta), mask)),
        "mismatch/log_ppl_diff_abs_seq_mean": over_responses(jnp.abs(difference)),
        "mismatch/log_ppl_diff_seq_max": masked_max(difference, responses),
        "mismatch/log_ppl_diff_seq_min": masked_min(difference, responses),
        "mismatch/ppl_train_seq_mean": over_responses(perplexity(logp_old)),
        "mismatch/ppl_rollout_seq_mean": over_responses(perplexity(logp_rollout)),
        "mismatch/ppl_ratio_seq_mean": over_responses(jnp.exp(-mean)),
        "mismatch/chi2_token_seq_mean": over_responses(response_mean(jnp.expm1(2.0 * x), mask)),
        "mismatch/chi2_seq_product": over_responses(jnp.expm1(2.0 * total)),
        "mismatch/chi2_seq_geometric": over_responses(jnp.expm1(2.0 * mean)),
        "mismatch/ratio_token_seq_mean": over_responses(response_mean(jnp.exp(x), mask)),
        "mismatch/ratio_geometric_seq_mean": over_responses(jnp.exp(mean)),
        "mismatch/ratio_product_seq_mean": over_responses(jnp.exp(total)),
    }


def probability_mismatch(
    logp_old: Float[Array, "B T"], logp_rollout: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Returns metrics on the probabilities p and q, in which unlikely tokens count for less.

    - `mismatch/prob_abs_diff_token_mean`, `…_max`, `…_std`: statistics of |p − q| [verl:
      `rollout_probs_diff_…`, whose std divides by n − 1]
    - `mismatch/prob_pearson`: correlation between p and q over all tokens, the check used for
      MiniMax-M1 (arXiv:2506.13585) [verl: `rollout_actor_probs_pearson_corr`]
    - `mismatch/prob_diff_seq_mean`: mean_i mean_t(p − q) [ROLL: `train_infer_diff_token`, as well
      as `…_geometric` and `…_segment`, which have the same mean]
    - `mismatch/prob_diff_sum_seq_mean`: mean_i Σ_t (p − q) [ROLL: `train_infer_diff_sequence`]
    """
    p, q = (jnp.exp(jnp.where(mask, at_least_float32(x), 0.0)) for x in (logp_old, logp_rollout))
    difference = p - q  # 0 outside the mask, where both are 1
    size, responses = jnp.abs(difference), mask.any(-1)
    return {
        "mismatch/prob_abs_diff_token_mean": masked_mean(size, mask),
        "mismatch/prob_abs_diff_token_max": masked_max(size, mask),
        "mismatch/prob_abs_diff_token_std": masked_spread(size, mask),
        "mismatch/prob_pearson": masked_correlation(p, q, mask),
        "mismatch/prob_diff_seq_mean": masked_mean(response_mean(difference, mask), responses),
        "mismatch/prob_diff_sum_seq_mean": masked_mean(difference.sum(-1), responses),
    }


def staleness_metrics(
    logp: Float[Array, "B T"], logp_old: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Metrics:
    """Returns distances between the current and the rollout's policy, computed by the trainer.

    - `staleness/kl_k3_token_mean`: mean(e^s − 1 − s)
    - `staleness/abs_token_mean`: mean |s|
    - `staleness/ratio_deviation_max`: max |π_θ/π_old − 1| over all tokens. In the first mini-batch
      after `score`, it is 0 up to rounding
    """
    s = log_ratio(logp, logp_old, mask)
    return {
        "staleness/kl_k3_token_mean": masked_mean(k3(s), mask),
        "staleness/abs_token_mean": masked_mean(jnp.abs(s), mask),
        "staleness/ratio_deviation_max": masked_max(jnp.abs(jnp.expm1(bounded(s))), mask),
    }
