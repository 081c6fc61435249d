"""What to watch: what each metric says, what is healthy, and when to look closer."""

from __future__ import annotations

import dataclasses
import math

from jaxrl_stable.report.run import AXES, LAYER, Run
from jaxrl_stable.report.text import escape, figure


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
        "mismatch/kl_k3",
        "KL(μ‖π_old) between sampler and trainer at equal weights: mean of e^Δ − 1 − Δ, "
        "Δ = log π_old − log μ.",
        "1e-3 with matched precision, 1e-2 with an FP8 sampler. A sharp rise precedes collapse.",
        0.0,
        0.05,
    ),
    Metric(
        "mismatch/kl_k1",
        "The same KL as the paper plots it: mean of log μ − log π_old.",
        "as k3, but noisier; may dip below 0",
        -0.05,
        0.05,
    ),
    Metric("mismatch/abs_mean", "Mean of |Δ|, Δ = log π_old − log μ."),
    Metric("mismatch/abs_max", "Largest |Δ| of one token.", "one token; heavy-tailed"),
    Metric(
        "mismatch/extreme_share", "Tokens with |Δ| > ln 2.", "below 0.01 (rule of thumb)", 0, 0.01
    ),
    Metric(
        "staleness/kl_k3",
        "KL between the policy of the rollout and the current one, mean of e^s − 1 − s, "
        "s = log π_θ − log π_old.",
        "small; 0 with one update a rollout",
    ),
    Metric("staleness/abs_mean", "Mean of |s|, s = log π_θ − log π_old."),
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
    Metric("weight/raw_mean", "Mean of π/μ, before the cap.", "near 1"),
    Metric("weight/raw_max", "Largest π/μ of one token, before the cap.", "one token; look at ESS"),
    Metric("weight/truncated_mean", "Mean of the capped weights."),
    Metric("weight/truncated_max", "Largest capped weight."),
    Metric("weight/over_cap_share", "Tokens whose weight was capped.", "below 0.01", 0, 0.01),
    Metric(
        "weight/ess",
        "Effective sample size (mean w)² / mean w², as a share.",
        "near 1 (rule of thumb: over 0.5)",
        0.5,
        1.0001,  # all weights equal, in float32
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
    Metric(f"routing/agreement_layer_{LAYER}", "Agreement of one layer.", "no layer far below"),
    Metric(
        "experts/max_violation",
        "Load of the busiest expert × E − 1, worst layer.",
        "0 = even; a steady rise means the router is collapsing",
    ),
    Metric("experts/idle_share", "Experts that got no token.", "near 0"),
    Metric("experts/confidence", "Probability mass of the experts used.", "changes slowly"),
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


def metric_table(run: Run) -> str:
    """What to watch: last values, a verdict on those that have a range, and how health looks."""
    rows = []
    for metric in METRICS:
        layers = run.layers(metric.name)
        if not layers or not metric.healthy:
            continue
        low, high = (end(map(run.last, layers)) for end in (min, max))
        verdict = ""
        if math.isfinite(metric.low):
            fine = metric.low <= low and high <= metric.high
            verdict = f'<b class="{"good" if fine else "bad"}">{"ok" if fine else "look"}</b>'
        shown = figure(low) if low == high else f"{figure(low)} to {figure(high)}"
        interval = [run.last(name) for name in interval_names(metric.name)]
        if all(map(math.isfinite, interval)):
            shown += f"<br><small>{' to '.join(map(figure, interval))}</small>"
        rows.append(
            f'<tr><td><code>{escape(metric.name)}</code></td><td class="n">{shown}</td>'
            f'<td>{verdict}</td><td class="hide">{escape(metric.meaning)}</td>'
            f"<td>{escape(metric.healthy)}</td></tr>"
        )
    heads = '<th>Metric</th><th class="n">Last value</th><th></th><th class="hide">What it is</th>'
    return (
        f'<div class="scroll"><table><tr>{heads}<th>Healthy</th></tr>{"".join(rows)}</table></div>'
    )


def other_metrics(run: Run) -> str:
    """The rest: known ones without a healthy state, unknown ones, and those never finite."""
    watched = {name for metric in METRICS if metric.healthy for name in run.layers(metric.name)}
    watched |= {end for name in watched for end in interval_names(name)}
    meanings = {metric.name: metric.meaning for metric in METRICS}
    names = {name for row in run.rows for name in row} - AXES - watched
    rows = "".join(
        f'<tr><td><code>{escape(name)}</code></td><td class="n">{figure(run.last(name))}</td>'
        f'<td class="hide">{escape(meanings.get(name, ""))}</td></tr>'
        for name in sorted(names)
    )
    return f'<h2>Other metrics</h2><table class="other">{rows}</table>' if names else ""


def interval_names(name: str) -> tuple[str, str]:
    """The metrics that hold the ends of a metric's 95 % interval, where it has one."""
    return f"{name}_low", f"{name}_high"
