"""The meaning of each metric, and what it looks like in a healthy run."""

from __future__ import annotations

import dataclasses
import math

from jaxrl_stable.report.run import LAYER


@dataclasses.dataclass(frozen=True)
class Metric:
    """Meaning of a metric. The code that computes it documents its exact definition.

    Attributes:
      name: name in metrics.jsonl; a final `LAYER` matches every layer.
      meaning: quantity that it measures.
      healthy: its behaviour in a healthy run; "" if it needs no watching.
      low, high: range of healthy last values; infinite if the metric is not judged.
    """

    name: str
    meaning: str
    healthy: str = ""
    low: int | float = -math.inf
    high: int | float = math.inf


METRICS = (
    Metric("eval/reward", "Held-out reward: mean over k samples per problem.", "rises"),
    Metric("eval/avg_at_k", "Held-out accuracy: mean over k samples per problem.", "rises"),
    Metric(
        "eval/pass_at_k",
        "Share of problems that at least one of k samples solves.",
        "rises or stays",
    ),
    Metric("eval/k", "Samples per held-out problem."),
    Metric("eval/problems", "Number of held-out problems."),
    Metric("eval/length", "Held-out response length in tokens.", "no jumps, below the limit"),
    Metric("eval/truncated_share", "Held-out responses cut at the limit.", "near 0", 0, 0.1),
    Metric(
        "eval/invalid_share",
        "Held-out samples without an answer that the reward can read.",
        "falls to near 0",
    ),
    Metric(
        "eval/failed_share", "Held-out samples whose checker timed out or failed.", "0", 0, 0.01
    ),
    Metric(
        "mismatch/kl_k3_token_mean",
        "KL(μ‖π_old) between sampler and trainer with the same weights: mean of e^Δ − 1 − Δ, "
        "Δ = log π_old − log μ.",
        "1e-3 with matched precision, 1e-2 with an FP8 sampler. A sharp rise precedes collapse.",
        0.0,
        0.05,
    ),
    Metric(
        "mismatch/kl_k1_token_mean",
        "This KL, estimated as in the paper: mean of log μ − log π_old.",
        "like k3, but noisier; may be below 0",
        -0.05,
        0.05,
    ),
    Metric(
        "mismatch/kl_k3_reverse_token_mean", "Mean of e^−Δ − 1 + Δ; one bad token can dominate it."
    ),
    Metric(
        "mismatch/js_token_mean", "Jensen–Shannon divergence of μ and π_old: mean of ln cosh(Δ/2)."
    ),
    Metric("mismatch/mult_prob_error_token_mean", "Mean of e^|Δ|; 1 if equal."),
    Metric("mismatch/abs_token_mean", "Mean of |Δ|, Δ = log π_old − log μ."),
    Metric("mismatch/abs_token_max", "Largest |Δ| over tokens.", "a single token; heavy-tailed"),
    Metric("mismatch/abs_token_min", "Smallest |Δ| over tokens."),
    Metric("mismatch/abs_token_std", "Standard deviation of |Δ| over tokens."),
    Metric(
        "mismatch/extreme_share", "Tokens with |Δ| > ln 2.", "below 0.01 (rule of thumb)", 0, 0.01
    ),
    Metric("mismatch/chi2_token_mean", "χ² over tokens: mean of e^2Δ, minus 1."),
    Metric("mismatch/ratio_token_mean", "Mean of e^Δ over tokens; 1 in expectation."),
    Metric("mismatch/kl_k1_seq_mean", "k1, averaged per response, then over responses."),
    Metric("mismatch/kl_k3_seq_mean", "k3, averaged per response, then over responses."),
    Metric("mismatch/log_ppl_diff_abs_seq_mean", "Mean over responses of |mean Δ|."),
    Metric("mismatch/log_ppl_diff_seq_max", "Largest per-response mean of −Δ."),
    Metric("mismatch/log_ppl_diff_seq_min", "Smallest per-response mean of −Δ."),
    Metric("mismatch/ppl_train_seq_mean", "Perplexity under π_old, mean over responses."),
    Metric("mismatch/ppl_rollout_seq_mean", "Perplexity under μ, mean over responses."),
    Metric("mismatch/ppl_ratio_seq_mean", "Perplexity under π_old ÷ under μ, mean over responses."),
    Metric(
        "mismatch/chi2_token_seq_mean",
        "Mean of e^2Δ, averaged per response, then over responses; minus 1.",
    ),
    Metric("mismatch/chi2_seq_product", "χ² over responses: mean of e^(2 ΣΔ), minus 1."),
    Metric(
        "mismatch/chi2_seq_geometric",
        "Like the product, with each response's mean Δ instead of its sum.",
    ),
    Metric(
        "mismatch/ratio_token_seq_mean", "Mean of e^Δ, averaged per response, then over responses."
    ),
    Metric("mismatch/ratio_geometric_seq_mean", "Mean over responses of e^(mean Δ)."),
    Metric("mismatch/ratio_product_seq_mean", "Mean over responses of e^(ΣΔ)."),
    Metric(
        "mismatch/prob_abs_diff_token_mean", "Mean of |p − q|, the probabilities under π_old and μ."
    ),
    Metric("mismatch/prob_abs_diff_token_max", "Largest |p − q| over tokens."),
    Metric("mismatch/prob_abs_diff_token_std", "Standard deviation of |p − q| over tokens."),
    Metric("mismatch/prob_pearson", "Correlation between p and q over tokens; 1 if equal."),
    Metric("mismatch/prob_diff_seq_mean", "Mean over responses of the mean of p − q."),
    Metric("mismatch/prob_diff_sum_seq_mean", "Mean over responses of the sum of p − q."),
    Metric("mismatch/kl_entropy_ratio", "Mismatch KL (k3) ÷ entropy of the policy."),
    Metric(
        "staleness/kl_k3_token_mean",
        "KL between the rollout policy and the current policy: mean of e^s − 1 − s, "
        "s = log π_θ − log π_old.",
        "small; 0 with one update per rollout",
    ),
    Metric("staleness/abs_token_mean", "Mean of |s|, s = log π_θ − log π_old."),
    Metric(
        "staleness/ratio_deviation_max",
        "Largest |π_θ/π_old − 1| over the tokens of all mini-batches.",
        "a single token; grows over the updates of a rollout",
    ),
    Metric(
        "validity/violating_share",
        "Responses whose weight Π(1 + δ_t), δ = π_θ/μ − 1, differs by more than 0.1 from 1 + Σδ_t, "
        "the first-order form behind the token-level objective.",
        "near 0 (quickstart: 0.02); grows with length and with both KLs",
    ),
    Metric(
        "validity/value_error",
        "Mean of that difference, weighted by |advantage|. Second order in δ.",
        "far below 1 (quickstart: 0.01)",
    ),
    Metric(
        "validity/gradient_error",
        "Like value_error, for the weight of a token's gradient: Π(1 + δ_t) against 1 + δ_t. First "
        "order in δ.",
        "below 1 (quickstart: 0.1); near 1 the two gradients have little in common",
    ),
    Metric(
        "validity/value_bias",
        "Like value_error, with the signs of the difference and the advantage: above 0, the "
        "token-level objective is too low.",
    ),
    Metric("validity/interaction", "Value error that neither ratio causes alone."),
    Metric("validity/mismatch_violating_share", "Violating share if only π_old/μ were not 1."),
    Metric("validity/mismatch_value_error", "Value error if only π_old/μ were not 1."),
    Metric("validity/mismatch_gradient_error", "Gradient error if only π_old/μ were not 1."),
    Metric("validity/staleness_violating_share", "Violating share if only π_θ/π_old were not 1."),
    Metric("validity/staleness_value_error", "Value error if only π_θ/π_old were not 1."),
    Metric("validity/staleness_gradient_error", "Gradient error if only π_θ/π_old were not 1."),
    Metric("reward/mean", "Mean score of the training samples.", "rises; noisy"),
    Metric("reward/accuracy", "Share of training samples that are judged correct.", "rises; noisy"),
    Metric(
        "reward/invalid_share",
        "Samples without an answer that the reward can read.",
        "falls to near 0; if not, look at the format in the samples",
    ),
    Metric("reward/failed_share", "Samples whose checker timed out or failed.", "0", 0, 0.01),
    Metric(
        "reward/zero_variance_share",
        "Groups whose scores are all equal; they give no gradient if the group is the baseline.",
        "well below 1; near 1, the problems are too easy or too hard",
    ),
    Metric(
        "entropy",
        "Entropy over the whole vocabulary, on sampled prefixes.",
        "changes slowly; a sharp fall is collapse",
    ),
    Metric("response/length", "Response length in tokens.", "no jumps, below the limit"),
    Metric("response/tokens", "Response tokens per rollout batch."),
    Metric("response/truncated_share", "Responses cut at the length limit.", "near 0", 0, 0.1),
    Metric(
        "response/unknown_share",
        "Response tokens whose id the tokenizer lacks; the reward sees U+FFFD.",
        "0, or falls to 0 as the policy learns to avoid them",
        0,
        0.01,
    ),
    Metric("weight/raw_mean", "Mean of the objective's ratio w, before any bound.", "near 1"),
    Metric("weight/raw_max", "Largest w over tokens.", "a single token; look at ESS"),
    Metric("weight/raw_min", "Smallest w over tokens."),
    Metric("weight/raw_std", "Standard deviation of w over tokens."),
    Metric("weight/raw_seq_mean", "Mean of w, averaged per response, then over responses."),
    Metric("weight/raw_seq_max", "Largest per-response mean of w."),
    Metric("weight/raw_seq_min", "Smallest per-response mean of w."),
    Metric("weight/raw_seq_std", "Standard deviation of the per-response means of w."),
    Metric("weight/abs_log_mean", "Mean of |ln w|."),
    Metric("weight/share_above_2", "Tokens with w > 2."),
    Metric("weight/share_below_half", "Tokens with w < 1/2."),
    Metric("weight/seq_share_above_2", "Responses whose mean of w is above 2."),
    Metric("weight/seq_share_below_half", "Responses whose mean of w is below 1/2."),
    *(
        Metric(f"weight/bucket_{low}_{high}", f"Tokens with w in [{shown})")
        for low, high, shown in (
            ("000", "025", "0, 0.25"),
            ("025", "050", "0.25, 0.5"),
            ("050", "090", "0.5, 0.9"),
            ("090", "110", "0.9, 1.1"),
            ("110", "200", "1.1, 2"),
            ("200", "400", "2, 4"),
            ("400", "up", "4, ∞"),
        )
    ),
    Metric("weight/used_mean", "Mean of the weights in use, after bounds."),
    Metric("weight/used_max", "Largest weight in use."),
    Metric("weight/used_min", "Smallest weight in use."),
    Metric("weight/used_std", "Standard deviation of the weights in use."),
    Metric("weight/truncated_share", "Tokens whose weight hit a bound.", "below 0.01", 0, 0.01),
    Metric(
        "weight/ess",
        "Effective sample size (mean w)² / mean w², as a share.",
        "near 1 (rule of thumb: above 0.5)",
        0.5,
        1,
    ),
    Metric(
        "clip/high_share",
        "Tokens without gradient: the advantage pushes up, but the policy is already past ε.",
        "below 0.01 at token level with ε 0.2/0.27; sequence-level objectives clip 0.1 to 0.3",
        0,
        0.3,
    ),
    Metric(
        "clip/low_share",
        "Like clip/high_share, for negative advantages.",
        "like clip/high_share",
        0,
        0.3,
    ),
    Metric("clip/region_share", "Tokens without gradient, in either direction."),
    Metric("clip/high_seq_max", "Largest per-response clip/high_share."),
    Metric("clip/low_seq_min", "Smallest per-response clip/low_share."),
    Metric("clip/kl_k3_clipped", "Mean of w − 1 − ln w over tokens without gradient."),
    Metric("clip/kl_k3_kept", "Like clip/kl_k3_clipped, over tokens with a gradient."),
    Metric("correction/factor_mean", "Mean factor of the correction, including dropped tokens."),
    Metric(
        "correction/dropped_share", "Tokens that the correction drops.", "small; they are lost data"
    ),
    Metric("correction/dropped_response_share", "Responses whose tokens are all dropped."),
    Metric("correction/kl_k3_dropped", "Mismatch KL (k3) of dropped tokens."),
    Metric("correction/kl_k3_kept", "Mismatch KL (k3) of kept tokens."),
    Metric("sampling/rounds", "Rollouts drawn for the batch (dynamic sampling)."),
    Metric(
        "sampling/informative_share",
        "Groups in the batch whose scores give an advantage other than 0, after the overlong "
        "filter. Penalties, KL and entropy do not count.",
        "above 0; at 0 the scores teach nothing",
    ),
    Metric("reference/kl", "KL to the reference policy, without its coefficient.", "grows slowly"),
    Metric("gradient/norm", "Global norm before clipping.", "finite, without spikes"),
    Metric("gradient/zero_share", "Share of updates whose gradient was exactly 0.", "near 0"),
    Metric("gradient/skipped", "Updates skipped so far because of non-finite values.", "0", 0, 0),
    Metric(
        "optimizer/learning_rate",
        "Learning rate of the last gradient step of the rollout that was not skipped.",
        "follows the schedule",
    ),
    Metric(
        "routing/agreement",
        "Share of the sampler's experts that the trainer's router, without replay, also chooses.",
        "about 0.9 in a deep model (R3 paper)",
        0.8,
        1,
    ),
    Metric(
        "routing/differing_tokens_share",
        "Tokens with different experts in at least one layer.",
        "grows with depth: up to 0.94 at 48 layers (R3 paper)",
    ),
    Metric(
        "routing/zero_overlap_share",
        "(layer, token) pairs whose choices share no expert.",
        "near 0; more indicates shifted or stale routing",
    ),
    Metric(f"routing/agreement_layer_{LAYER}", "Agreement in one layer.", "no layer far below"),
    Metric(
        "experts/max_violation",
        "Load of the busiest expert × E − 1, worst layer.",
        "0 if even; a steady rise means that the router collapses",
    ),
    Metric(
        "experts/min_violation", "Like max_violation, for the least busy expert; −1 if it is idle."
    ),
    Metric("experts/avg_violation", "Mean of |load × E − 1| over layers and experts."),
    Metric("experts/idle_share", "Experts without any token.", "near 0"),
    Metric(
        "experts/device_imbalance",
        "Load of the busiest device of the expert axis, divided by the mean.",
        "1 if even; experts take this many times as long",
    ),
    Metric("experts/confidence", "Probability mass of the experts used.", "changes slowly"),
    Metric("packing/fill", "Share of computed columns that hold a token.", "near 1"),
    Metric(
        "packing/columns_share",
        "Computed columns, relative to unpacked rows: remaining cost of score and update.",
        "well below 1; otherwise packing gains nothing",
    ),
    Metric("throughput/tokens_per_s", "Response tokens per second of the whole step.", "steady"),
    Metric("time/step", "Seconds per step."),
    Metric("time/rollout", "Seconds for sampling."),
    Metric("time/reward", "Seconds for checking answers."),
    Metric("time/score", "Seconds for computing log π_old."),
    Metric("time/update", "Seconds for the updates."),
    Metric("loss", "The objective. In RL, its value says little; look at the reward."),
    Metric("sft/loss", "Negative log-likelihood of the answers, nats per token.", "falls"),
    Metric("sft/entropy", "Entropy on the tokens of the answers.", "falls"),
)
