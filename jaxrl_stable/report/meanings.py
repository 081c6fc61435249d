"""What each metric says, and how it looks in a run that goes well."""

from __future__ import annotations

import dataclasses
import math

from jaxrl_stable.report.run import LAYER


@dataclasses.dataclass(frozen=True)
class Metric:
    """Meaning of a metric. Its definition stands beside the code that computes it.

    Attributes:
      name: as recorded; `LAYER` at its end stands for every layer.
      meaning: what it measures.
      healthy: how it looks in a run that goes well; "" where there is nothing to watch.
      low, high: the range of last values that needs no closer look; not judged when infinite.
    """

    name: str
    meaning: str
    healthy: str = ""
    low: float = -math.inf
    high: float = math.inf


METRICS = (
    Metric("eval/avg_at_k", "Held-out accuracy: mean over k samples a problem.", "rises"),
    Metric("eval/pass_at_k", "Share of problems that one of k samples solves.", "rises, or stays"),
    Metric("eval/k", "Samples a held-out problem."),
    Metric("eval/problems", "Held-out problems."),
    Metric("eval/length", "Held-out response length in tokens.", "no jumps, not at the limit"),
    Metric("eval/truncated_share", "Held-out responses cut at the limit.", "near 0", 0, 0.1),
    Metric("eval/failed_share", "Held-out samples whose checker timed out or broke.", "0", 0, 0.01),
    Metric(
        "mismatch/kl_k3_token_mean",
        "KL(μ‖π_old) between sampler and trainer at equal weights: mean of e^Δ − 1 − Δ, "
        "Δ = log π_old − log μ.",
        "1e-3 with matched precision, 1e-2 with an FP8 sampler. A sharp rise precedes collapse.",
        0.0,
        0.05,
    ),
    Metric(
        "mismatch/kl_k1_token_mean",
        "The same KL as the paper plots it: mean of log μ − log π_old.",
        "as k3, but noisier; may dip below 0",
        -0.05,
        0.05,
    ),
    Metric("mismatch/kl_k3_reverse_token_mean", "Mean of e^−Δ − 1 + Δ; one bad token decides it."),
    Metric("mismatch/js_token_mean", "Jensen–Shannon divergence of the two: mean of ln cosh(Δ/2)."),
    Metric("mismatch/mult_prob_error_token_mean", "Mean of e^|Δ|; 1 when equal."),
    Metric("mismatch/abs_token_mean", "Mean of |Δ|, Δ = log π_old − log μ."),
    Metric("mismatch/abs_token_max", "Largest |Δ| of one token.", "one token; heavy-tailed"),
    Metric("mismatch/abs_token_min", "Smallest |Δ| of one token."),
    Metric("mismatch/abs_token_std", "Standard deviation of |Δ| over tokens."),
    Metric(
        "mismatch/extreme_share", "Tokens with |Δ| > ln 2.", "below 0.01 (rule of thumb)", 0, 0.01
    ),
    Metric("mismatch/chi2_token_mean", "χ² over tokens: mean of e^2Δ, less 1."),
    Metric("mismatch/ratio_token_mean", "Mean of e^Δ over tokens; 1 in expectation."),
    Metric("mismatch/kl_k1_seq_mean", "k1 as a mean over responses of each one's mean."),
    Metric("mismatch/kl_k3_seq_mean", "k3 as a mean over responses of each one's mean."),
    Metric("mismatch/log_ppl_diff_abs_seq_mean", "Mean over responses of |mean Δ|."),
    Metric("mismatch/log_ppl_diff_seq_max", "Largest mean of −Δ of one response."),
    Metric("mismatch/log_ppl_diff_seq_min", "Smallest mean of −Δ of one response."),
    Metric("mismatch/ppl_train_seq_mean", "Perplexity under π_old, mean over responses."),
    Metric("mismatch/ppl_rollout_seq_mean", "Perplexity under μ, mean over responses."),
    Metric("mismatch/ppl_ratio_seq_mean", "Perplexity under π_old ÷ under μ, mean over responses."),
    Metric("mismatch/chi2_token_seq_mean", "Mean of e^2Δ, less 1, as a mean over responses."),
    Metric("mismatch/chi2_seq_product", "χ² over responses: mean of e^(2 ΣΔ), less 1."),
    Metric("mismatch/chi2_seq_geometric", "The same of the mean Δ of a response, not its sum."),
    Metric("mismatch/ratio_token_seq_mean", "Mean of e^Δ as a mean over responses."),
    Metric("mismatch/ratio_geometric_seq_mean", "Mean over responses of e^(mean Δ)."),
    Metric("mismatch/ratio_product_seq_mean", "Mean over responses of e^(ΣΔ)."),
    Metric(
        "mismatch/prob_abs_diff_token_mean", "Mean of |p − q|, the probabilities under π_old, μ."
    ),
    Metric("mismatch/prob_abs_diff_token_max", "Largest |p − q| of one token."),
    Metric("mismatch/prob_abs_diff_token_std", "Standard deviation of |p − q| over tokens."),
    Metric("mismatch/prob_pearson", "Correlation of p and q over tokens; 1 when equal."),
    Metric("mismatch/prob_diff_seq_mean", "Mean over responses of the mean of p − q."),
    Metric("mismatch/prob_diff_sum_seq_mean", "Mean over responses of the sum of p − q."),
    Metric("mismatch/kl_entropy_ratio", "Mismatch KL (k3) ÷ entropy of the policy."),
    Metric(
        "staleness/kl_k3_token_mean",
        "KL between the policy of the rollout and the current one, mean of e^s − 1 − s, "
        "s = log π_θ − log π_old.",
        "small; 0 with one update a rollout",
    ),
    Metric("staleness/abs_token_mean", "Mean of |s|, s = log π_θ − log π_old."),
    Metric(
        "staleness/ratio_deviation_max",
        "Largest |π_θ/π_old − 1| of one token in any mini-batch.",
        "one token; grows over the updates of a rollout",
    ),
    Metric(
        "validity/violating_share",
        "Responses whose weight Π(1 + δ_t), δ = π_θ/μ − 1, is more than 0.1 off 1 + Σδ_t, the form "
        "of first order that the token-level objective rests on.",
        "near 0 (quickstart: 0.02); grows with length and with both KLs",
    ),
    Metric(
        "validity/value_error",
        "Mean of that difference, by size of the advantage. Of second order in δ.",
        "far below 1 (quickstart: 0.01)",
    ),
    Metric(
        "validity/gradient_error",
        "The same between the weights of a token's gradient, Π(1 + δ_t) and 1 + δ_t. Of first "
        "order in δ.",
        "below 1 (quickstart: 0.1); near 1 the two gradients have little in common",
    ),
    Metric(
        "validity/value_bias",
        "The difference with its sign and that of the advantage: above 0 the token-level objective "
        "is too low.",
    ),
    Metric("validity/interaction", "Value error that neither part has alone."),
    Metric("validity/mismatch_violating_share", "Violating share if only π_old/μ were not 1."),
    Metric("validity/mismatch_value_error", "Value error if only π_old/μ were not 1."),
    Metric("validity/mismatch_gradient_error", "Gradient error if only π_old/μ were not 1."),
    Metric("validity/staleness_violating_share", "Violating share if only π_θ/π_old were not 1."),
    Metric("validity/staleness_value_error", "Value error if only π_θ/π_old were not 1."),
    Metric("validity/staleness_gradient_error", "Gradient error if only π_θ/π_old were not 1."),
    Metric("reward/mean", "Mean score of the training samples.", "rises; noisy"),
    Metric("reward/accuracy", "Training samples with score 1 or more.", "rises; noisy"),
    Metric("reward/failed_share", "Samples whose checker timed out or broke.", "0", 0, 0.01),
    Metric(
        "reward/zero_variance_share",
        "Groups whose scores are all equal: they give no gradient.",
        "well below 1; near it the problems are too easy or too hard",
    ),
    Metric(
        "entropy",
        "Entropy over the whole vocabulary, on sampled prefixes.",
        "changes slowly; a sharp fall is collapse",
    ),
    Metric("response/length", "Response length in tokens.", "no jumps, not at the limit"),
    Metric("response/tokens", "Response tokens of a rollout batch."),
    Metric("response/truncated_share", "Responses cut at the length limit.", "near 0", 0, 0.1),
    Metric("weight/raw_mean", "Mean of the objective's ratio w, before any bound.", "near 1"),
    Metric("weight/raw_max", "Largest w of one token.", "one token; look at ESS"),
    Metric("weight/raw_min", "Smallest w of one token."),
    Metric("weight/raw_std", "Standard deviation of w over tokens."),
    Metric("weight/raw_seq_mean", "Mean over responses of each one's mean of w."),
    Metric("weight/raw_seq_max", "Largest mean of w of one response."),
    Metric("weight/raw_seq_min", "Smallest mean of w of one response."),
    Metric("weight/raw_seq_std", "Standard deviation of the responses' means of w."),
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
    Metric("weight/used_mean", "Mean of the weights as they are used, after their bounds."),
    Metric("weight/used_max", "Largest weight that is used."),
    Metric("weight/used_min", "Smallest weight that is used."),
    Metric("weight/used_std", "Standard deviation of the weights that are used."),
    Metric("weight/truncated_share", "Tokens whose weight met a bound.", "below 0.01", 0, 0.01),
    Metric(
        "weight/ess",
        "Effective sample size (mean w)² / mean w², as a share.",
        "near 1 (rule of thumb: over 0.5)",
        0.5,
        1,
    ),
    Metric(
        "clip/high_share",
        "Tokens without gradient: the advantage pushes up, the policy is past ε already.",
        "below 0.01 at token level with ε 0.2/0.27; sequence-level objectives clip 0.1 to 0.3",
        0,
        0.3,
    ),
    Metric(
        "clip/low_share", "The same where the advantage pushes down.", "as clip/high_share", 0, 0.3
    ),
    Metric("clip/region_share", "Tokens without gradient, either way."),
    Metric("clip/high_seq_max", "Largest high share of one response."),
    Metric("clip/low_seq_min", "Smallest low share of one response."),
    Metric("clip/kl_k3_clipped", "Mean of w − 1 − ln w over the tokens without gradient."),
    Metric("clip/kl_k3_kept", "The same over the tokens that keep theirs."),
    Metric("correction/factor_mean", "Mean factor of the correction, dropped tokens included."),
    Metric("correction/dropped_share", "Tokens that it drops.", "small: they are data lost"),
    Metric("correction/dropped_response_share", "Responses of which it leaves no token."),
    Metric("correction/kl_k3_dropped", "Mismatch KL (k3) of the tokens that it drops."),
    Metric("correction/kl_k3_kept", "Mismatch KL (k3) of the tokens that it keeps."),
    Metric("sampling/rounds", "Rollouts drawn for the batch (dynamic sampling)."),
    Metric("sampling/informative_share", "Groups of the batch whose scores differ."),
    Metric("reference/kl", "KL to the reference policy, before its coefficient.", "grows slowly"),
    Metric("gradient/norm", "Global norm before clipping.", "finite, without spikes"),
    Metric("gradient/skipped", "Updates left out so far, as not finite.", "0", 0, 0),
    Metric(
        "routing/agreement",
        "Share of the sampler's experts that the trainer's router, unreplayed, chooses as well.",
        "about 0.9 in a deep model (R3 paper)",
        0.8,
        1,
    ),
    Metric(
        "routing/differing_tokens_share",
        "Tokens with another choice in at least one layer.",
        "grows with depth: up to 0.94 at 48 layers (R3 paper)",
    ),
    Metric(
        "routing/zero_overlap_share",
        "Choices of a layer and token that share no expert at all.",
        "near 0; more speaks of shifted or stale routes",
    ),
    Metric(f"routing/agreement_layer_{LAYER}", "Agreement of one layer.", "no layer far below"),
    Metric(
        "experts/max_violation",
        "Load of the busiest expert × E − 1, worst layer.",
        "0 = even; a steady rise means the router is collapsing",
    ),
    Metric("experts/min_violation", "The same of the least busy one; −1 when it is idle."),
    Metric("experts/avg_violation", "Mean of |load × E − 1| over layers and experts."),
    Metric("experts/idle_share", "Experts that got no token.", "near 0"),
    Metric(
        "experts/device_imbalance",
        "Load of the busiest device of the expert axis over the mean one.",
        "1 = even; experts take longer by this factor",
    ),
    Metric("experts/confidence", "Probability mass of the experts used.", "changes slowly"),
    Metric("packing/fill", "Columns that hold a token, of those run over.", "near 1"),
    Metric(
        "packing/columns_share",
        "Columns run over, of those of unpacked rows: what score and update still cost.",
        "well below 1; else packing gains nothing",
    ),
    Metric("throughput/tokens_per_s", "Response tokens a second, of the whole step.", "steady"),
    Metric("time/step", "Seconds a step."),
    Metric("time/rollout", "Seconds sampling."),
    Metric("time/reward", "Seconds checking answers."),
    Metric("time/score", "Seconds computing log π_old."),
    Metric("time/update", "Seconds in the updates."),
    Metric("loss", "The objective. Its value says little in RL; read the reward."),
    Metric("sft/loss", "Negative log-likelihood of the answers, nats per token.", "falls"),
    Metric("sft/entropy", "Entropy on the answers' tokens.", "falls"),
)
