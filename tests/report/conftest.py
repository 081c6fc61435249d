"""A synthetic run as the training program records it, with plausible curves."""

import json
import math

import numpy as np
import pytest

from jaxrl_stable import report
from jaxrl_stable.run import writer as metrics

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[2J\u202e'


def synthetic_run(workdir, steps=400, updates=4, layers=8):
    rng = np.random.default_rng(0)
    with metrics.MetricsWriter(workdir, console=False) as writer:
        for step in range(steps + 1):
            t = step / steps
            skill = 1 / (1 + math.exp(-8 * (t - 0.4)))
            if step % max(1, steps // 16) == 0:
                score = 0.08 + 0.8 * skill + rng.normal(0, 0.012)
                writer.write(
                    step,
                    {
                        "eval/avg_at_k": score,
                        "eval/avg_at_k_low": score - 0.05,
                        "eval/avg_at_k_high": score + 0.05,
                        "eval/pass_at_k": min(1.0, score + 0.1),
                        "eval/reward": 2 * score,
                        "eval/invalid_share": 0.1,
                        "eval/k": 8.0,
                        "eval/length": 45 + 50 * t,
                        "eval/truncated_share": max(0, 0.1 - 0.2 * t),
                        "gradient_steps": step * updates,
                    },
                )
            if step == 0:
                continue
            kl = 1.2e-3 * math.exp(1.3 * t + rng.normal(0, 0.25))
            load = 0.6 + 0.3 * rng.random()
            scalars = {
                "gradient_steps": step * updates,
                "mismatch/kl_k3_token_mean": kl,
                "mismatch/kl_k1_token_mean": kl + rng.normal(0, 6e-4),
                "mismatch/extreme_share": 0.4 * kl,
                "staleness/kl_k3_token_mean": 0.1 * kl,
                "validity/violating_share": min(1.0, 40 * kl),
                "validity/value_error": 11 * kl,
                "validity/gradient_error": 3 * math.sqrt(kl),
                "validity/mismatch_value_error": 10 * kl,
                "validity/staleness_value_error": kl,
                "reward/invalid_share": max(0, 0.3 - 0.3 * t),
                "reward/mean": 0.05 + 0.85 * skill + rng.normal(0, 0.05),
                "reward/zero_variance_share": 0.2 + 0.5 * t,
                "entropy": 0.25 + 0.5 * math.exp(-3 * t) + rng.normal(0, 0.01),
                "response/length": 40 + 60 * t + rng.normal(0, 3),
                "response/truncated_share": max(0, 0.12 - 0.2 * t + rng.normal(0, 0.01)),
                "weight/raw_max": math.exp(abs(rng.normal(0.6, 0.5))),
                "weight/truncated_share": 2e-4 * rng.random(),
                "weight/ess": 0.99 - 0.05 * rng.random(),
                "clip/high_share": 0.004 * rng.random() + 0.002,
                "clip/low_share": 0.003 * rng.random(),
                "gradient/norm": math.nan if step == 77 else math.exp(rng.normal(-0.5, 0.3)),
                "gradient/skipped": float(step >= 77),
                "routing/agreement": 0.93 - 0.02 * rng.random(),
                "routing/differing_tokens_share": 0.4 + 0.1 * rng.random(),
                "experts/max_violation": load,
                "experts/idle_share": max(0.0, 0.1 * load - 0.06),
                "experts/confidence": 0.6 + 0.02 * load,
                "time/rollout": 2.2 + 0.3 * rng.random(),
                "time/reward": 0.3,
                "time/score": 0.6 + 0.1 * rng.random(),
                "time/update": 1.5 + 0.2 * rng.random(),
                "throughput/tokens_per_s": 5200 + 300 * rng.normal(),
                "something/new": 1.25,
            }
            for layer in range(layers):
                key = f"routing/agreement_layer_{layer:02d}"
                scalars[key] = 0.98 - 0.012 * layer - 0.01 * rng.random()
            writer.write(step, scalars)
            if step % 50 == 0:
                writer.samples(step, [_sample_row(rng, step, good) for good in (True, False)])
    (workdir / "config.gin").write_text("train.steps = 400\nlogger.api_key = 'hunter2'\n")
    facts = {
        "name": "MiniRL with R3 on letter reversal",
        "objective": "MiniRL, ε 0.2/0.27, cap 5",
        "parameters": 168_960,
        "devices": ["cuda:0", "cuda:1"],
        "seconds": 3725.4,
        "gain": {"value": 0.8, "low": 0.75, "high": 0.85},
    }
    (workdir / "summary.json").write_text(json.dumps(facts))
    return workdir


def _sample_row(rng, step, good):
    tokens = ["The", " letters", " of", " “abcde”", ",\n", "read", " back", "wards", ":", " <b>"]
    tokens += [*("edcba" if good else "edbca"), "</b>", EVIL if step == 400 else "."]
    return {
        "prompt": "Reverse the letters: abcde",
        "response": "".join(tokens),
        "answer": "edcba",
        "score": float(good),
        "status": "ok",
        "advantage": 0.5 if good else -0.5,
        "tokens": tokens,
        "log_weight": rng.normal(0, 0.15, len(tokens)),
        "clipped": rng.random(len(tokens)) < 0.15,
        "differs": rng.integers(0, 4, len(tokens)) * (rng.random(len(tokens)) < 0.3),
    }


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Returns path and text of the page of a synthetic run."""
    path = report.write_report(synthetic_run(tmp_path_factory.mktemp("run")))
    return path, path.read_text(encoding="utf-8")
