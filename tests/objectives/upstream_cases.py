"""Losses, corrections and metrics that we define as verl, slime and the authors of BAPO do.

Each of our names and options is listed with theirs. `make_upstream_fixtures.py` runs their code,
`test_upstream_frozen.py` ours. Equal names may differ in meaning: `METRICS` maps verl's `kl` and
slime's `kl` to different names of ours.

They have these and we do not: rejection by k2, k3 and by the Bernoulli KL in both directions.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxrl_stable import corrections
from jaxrl_stable.objectives import bapo, cispo, dppo, dro, gmpo, gspo, minirl, ppo, reinforce, sapo

ROWS, WIDTH = 6, 9
SEEDS = 4, 5, 11  # of batches in which every clip acts
NO_BOUND = 1e9  # verl cannot express None: dual clip and truncation are on by default


class Batch(NamedTuple):
    """Inputs of both sides, in float64."""

    logp: np.ndarray  # [ROWS, WIDTH]; log π_θ, π_old, μ_old
    old: np.ndarray
    rollout: np.ndarray
    advantages: np.ndarray  # [ROWS]
    mask: np.ndarray  # [ROWS, WIDTH]; ragged, with holes


def draw(seed: int) -> Batch:
    """Makes rows in which the policies hardly differ, rows in which they do, and two outliers."""
    rng = np.random.default_rng(seed)
    shape = ROWS, WIDTH
    lengths = rng.permuted([1, 3, 5, 7, 8, WIDTH])[:, None]
    offset = 0.9 * (lengths == 1) - 0.9 * (lengths == 3)
    rollout = rng.uniform(-2.5, -0.1, shape) - np.abs(offset)
    old = rollout + rng.permuted([0.02, 0.1, 0.2, 0.4, 0.4, 0.6])[:, None] * rng.normal(size=shape)
    old = -np.abs(old + offset) - 0.02  # probabilities below 1
    logp = old + rng.permuted([3e-3, 0.1, 0.3, 0.5, 0.5, 0.5])[:, None] * rng.normal(size=shape)
    return Batch(
        logp=-np.abs(logp) - 0.02,
        old=old,
        rollout=rollout,
        advantages=rng.permuted([1.0, -1, 1, -1, 1, -1]) * rng.uniform(0.3, 1.5, ROWS),
        mask=(np.arange(WIDTH) == 0) | ((np.arange(WIDTH) < lengths) & (rng.random(shape) < 0.85)),
    )


class Loss(NamedTuple):
    """One loss.

    Attributes:
      ours, options: our objective and its options.
      theirs: the loss as "system name".
      settings: settings of their config.
      aggregation: aggregation of both; `horizon` is verl's `loss_scale_factor`.
      weights: verl's `rollout_is` and threshold, for π_old/μ_old.
      corrections: our equivalent correction, with its options.
      bypass: whether their old policy is the sampler.
      shares: maps a metric of ours to the metrics of theirs that add up to it.
    """

    ours: Callable
    options: dict[str, Any]
    theirs: str
    settings: dict[str, Any]
    aggregation: str
    horizon: float | None = None
    weights: tuple[str, float] | None = None
    corrections: tuple[Callable, dict[str, Any]] | None = None
    bypass: bool = False
    shares: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def clips(low: float, high: float, ratio_c: float = NO_BOUND) -> dict[str, float]:
    return dict(clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=ratio_c)


EACH, SUM = "seq-mean-token-mean", "seq-mean-token-sum"
REGION = {"clip/region_share": ("pg_clipfrac",)}
DUAL = {"clip/region_share": ("pg_clipfrac", "pg_clipfrac_lower")}
DPPO = REGION | {"weight/truncated_share": ("pg_clipfrac_lower",)}
TRUNCATED = {"weight/truncated_share": ("pg_clipfrac",)}
TIS = ("token", 1.3), (corrections.token_tis, dict(cap=1.3))
RECIPE = dict(low=(0.6, 0.8, 0.05), high=(1.2, 2.0, 0.05))


def bapo_case(target: float, low, high, dual_clip: float = 3.0) -> Loss:
    settings = {"adv_ratio_target": target, "clip_ratio_c": dual_clip}
    for bound, values in {"lower": low, "upper": high}.items():
        settings |= {f"ratio_{bound}_{k}": x for k, x in zip(("start", "max", "step"), values)}
    options = dict(form="code", low=low, high=high, target=target, dual_clip=dual_clip)
    return Loss(bapo, options, "bapo bapo", settings, "token-mean", shares=DUAL)


LOSSES = {
    "dppo, tv": Loss(
        dppo,
        dict(divergence="tv", threshold=0.1),
        "verl dppo_tv",
        clips(0.1, 0.1),
        "token-mean",
        bypass=True,
        shares=DPPO,
    ),
    "dppo, tv, truncated": Loss(
        dppo,
        dict(divergence="tv", threshold=0.2, truncation=1.2),
        "verl dppo_tv",
        clips(0.2, 0.2, 1.2),
        "token-mean",
        bypass=True,
        shares=DPPO,
    ),
    "dppo, kl": Loss(
        dppo,
        dict(divergence="kl", threshold=0.03),
        "verl dppo_kl",
        clips(0.03, 0.03),
        "token-mean",
        bypass=True,
        shares=DPPO,
    ),
    "dppo, kl, truncated": Loss(
        dppo,
        dict(divergence="kl", threshold=0.06, truncation=1.2),
        "verl dppo_kl",
        clips(0.06, 0.06, 1.2),
        SUM,
        bypass=True,
        shares=DPPO,
    ),
    "reinforce": Loss(reinforce, {}, "verl reinforce", {}, SUM),
    # The weights use π_θ here, as in verl's bypass mode.
    "minirl, not clipped": Loss(
        minirl,
        dict(clip=False, truncation=1.3),
        "verl reinforce",
        {},
        SUM,
        weights=("token", 1.3),
        bypass=True,
        shares={"weight/truncated_share": ("rollout_is_ratio_fraction_high",)},
    ),
    "grpo": Loss(ppo, {}, "verl vanilla", clips(0.2, 0.2), EACH, shares=REGION),
    "dapo": Loss(
        ppo, dict(clip_high=0.28), "verl vanilla", clips(0.2, 0.28), "token-mean", shares=REGION
    ),
    "dr_grpo": Loss(
        ppo,
        {},
        "verl vanilla",
        clips(0.2, 0.2),
        "seq-mean-token-sum-norm",
        horizon=16.0,
        shares=REGION,
    ),
    "dual clip": Loss(
        ppo, dict(dual_clip=1.3), "verl vanilla", clips(0.2, 0.2, 1.3), EACH, shares=DUAL
    ),
    "dual clip, slime": Loss(
        ppo,
        dict(dual_clip=1.3),
        "slime policy_loss",
        dict(eps_clip=0.2, eps_clip_high=0.2, eps_clip_c=1.3),
        EACH,
    ),
    "decoupled ppo": Loss(
        ppo, {}, "verl vanilla", clips(0.2, 0.2), "token-mean", None, *TIS, shares=REGION
    ),
    "gspo": Loss(
        gspo,
        dict(clip_low=0.03, clip_high=0.04),
        "verl gspo",
        clips(0.03, 0.04),
        EACH,
        shares=REGION,
    ),
    "gspo, form of tokens": Loss(
        gspo,
        dict(clip_low=0.03, clip_high=0.04, form="token"),
        "verl gspo",
        clips(0.03, 0.04),
        EACH,
        None,
        *TIS,
        shares=REGION,
    ),
    # verl counts tokens beyond either bound; we count only tokens that lose their gradient.
    "gmpo": Loss(gmpo, dict(clip_low=0.2, clip_high=0.3), "verl geo_mean", clips(0.2, 0.3), EACH),
    "cispo": Loss(
        cispo, dict(clip_high=0.3), "verl cispo", clips(1.0, 0.3), "token-mean", shares=TRUNCATED
    ),
    "cispo, two bounds": Loss(
        cispo,
        dict(clip_low=0.2, clip_high=0.3),
        "verl cispo",
        clips(0.2, 0.3),
        "token-mean",
        shares=TRUNCATED,
    ),
    "sapo": Loss(sapo, {}, "verl sapo", dict(tau_pos=1.0, tau_neg=1.05), EACH),
    "sapo, other temperatures": Loss(
        sapo,
        dict(temperature_high=3.0, temperature_low=5.0),
        "verl sapo",
        dict(tau_pos=3.0, tau_neg=5.0),
        EACH,
    ),
    "dro": Loss(dro, dict(beta=0.3), "verl-dro dro", dict(dro_beta=0.3), "token-mean"),
    "bapo, recipe": bapo_case(1.0, **RECIPE),
    # Each search stops midway in one of the batches, and at its start or end in the others.
    "bapo, target .9": bapo_case(0.9, **RECIPE),
    "bapo, target 1.24": bapo_case(1.24, **RECIPE),
    "bapo, target 1.55": bapo_case(1.55, **RECIPE),
    "bapo, fine steps": bapo_case(0.9, (0.7, 0.72, 0.01), (1.02, 3.0, 0.005), 1.4),
}


class Correction(NamedTuple):
    """One correction; `metrics` maps our metrics of it to their names."""

    ours: Callable
    options: dict[str, Any]
    system: str
    settings: dict[str, Any]
    metrics: Mapping[str, str] = MappingProxyType({})


OUTSIDE = {"correction/dropped_share": "rollout_is_oob_ratio"}


def rejected(option: str) -> dict[str, str]:
    return {
        "correction/dropped_share": "rollout_rs_masked_fraction",
        "correction/dropped_response_share": f"rollout_rs_{option}_seq_masked_fraction",
    }


def weigh(level: str, threshold: float | str, normalize: bool = False) -> dict[str, Any]:
    """verl's correction; one bound truncates, two bounds drop."""
    return dict(
        rollout_is=level, rollout_is_threshold=threshold, rollout_is_batch_normalize=normalize
    )


def reject(option: str, threshold: str) -> dict[str, Any]:
    """verl's correction; its bounds are for sampler / trainer, ours for trainer / sampler."""
    return dict(rollout_rs=option, rollout_rs_threshold=threshold)


def tis(level: str, mode: str, upper: float, lower: float | None = None, normalize: bool = False):
    """slime's correction."""
    return dict(
        tis_level=level,
        tis_mode=mode,
        tis_upper_bound=upper,
        tis_lower_bound=lower,
        tis_batch_normalize=normalize,
    )


def rs(level: str, lower: float, upper: float) -> dict[str, Any]:
    """slime's correction; the bounds are for trainer / sampler."""
    return tis("token", "truncate", NO_BOUND) | dict(
        use_rs=True, rs_level=level, rs_lower_bound=lower, rs_upper_bound=upper
    )


def between(low: float, high: float, **more) -> dict[str, Any]:
    return dict(low=low, high=high, **more)


c, LOW, HIGH = corrections, 0.8, 1.25
CORRECTIONS = {
    "token_tis": Correction(c.token_tis, dict(cap=1.3), "verl", weigh("token", 1.3)),
    "sequence_tis": Correction(c.sequence_tis, dict(cap=1.1), "verl", weigh("sequence", 1.1)),
    "normalized_token_tis": Correction(
        c.normalized_token_tis, dict(cap=1.3), "verl", weigh("token", 1.3, True)
    ),
    "normalized_sequence_tis": Correction(
        c.normalized_sequence_tis, dict(cap=1.1), "verl", weigh("sequence", 1.1, True)
    ),
    "icepop": Correction(
        c.icepop,
        between(LOW, HIGH),
        "verl",
        weigh("token", f"{LOW}_{HIGH}"),
        OUTSIDE,
    ),
    "icepop, not weighed": Correction(
        c.icepop,
        between(1 / 1.2, 1 / 0.7, weigh=False),
        "verl",
        reject("token_k1", "0.7_1.2"),
        {"correction/dropped_share": "rollout_rs_masked_fraction"},
    ),
    "sequence_mis": Correction(
        c.sequence_mis,
        between(0.5, 1.5),
        "verl",
        weigh("sequence", "0.5_1.5"),
        OUTSIDE,
    ),
    "sequence_mis, not weighed": Correction(
        c.sequence_mis,
        between(1 / 1.6, 1 / 0.6, weigh=False),
        "verl",
        reject("seq_sum_k1", "0.6_1.6"),
        rejected("seq_sum_k1"),
    ),
    "geometric_mask": Correction(
        c.geometric_mask,
        between(1 / 1.04, 1 / 0.9),
        "verl",
        reject("seq_mean_k1", "0.9_1.04"),
        rejected("seq_mean_k1"),
    ),
    "token_tis, slime": Correction(
        c.token_tis, dict(cap=1.3), "slime", tis("token", "truncate", 1.3)
    ),
    "token_tis, two bounds, slime": Correction(
        c.token_tis, dict(cap=1.3, floor=0.8), "slime", tis("token", "clip", 1.3, 0.8)
    ),
    "sequence_tis, slime": Correction(
        c.sequence_tis, dict(cap=1.1), "slime", tis("sequence", "truncate", 1.1)
    ),
    "normalized_token_tis, slime": Correction(
        c.normalized_token_tis,
        dict(cap=1.3),
        "slime",
        tis("token", "truncate", 1.3, normalize=True),
    ),
    "normalized_sequence_tis, slime": Correction(
        c.normalized_sequence_tis,
        dict(cap=1.1),
        "slime",
        tis("sequence", "truncate", 1.1, normalize=True),
    ),
    "icepop, slime": Correction(
        c.icepop, between(LOW, HIGH), "slime", tis("token", "mask", HIGH, LOW)
    ),
    "sequence_mis, slime": Correction(
        c.sequence_mis, between(0.5, 1.5), "slime", tis("sequence", "mask", 1.5, 0.5)
    ),
    "geometric_mask, slime": Correction(
        c.geometric_mask, between(0.96, 1.1), "slime rejection", rs("geometric", 0.96, 1.1)
    ),
    "veto": Correction(
        c.veto,
        dict(threshold=0.6),
        "slime veto",
        dict(mis_veto_threshold=0.6),
        {"correction/dropped_response_share": "catastrophic_seq_fraction"},
    ),
    "off_policy_sequence_mask": Correction(
        c.off_policy_sequence_mask, dict(delta=0.03), "slime opsm", dict(opsm_delta=0.03)
    ),
}

# Metrics of the mismatch π_old/μ_old, by their names.
OF_BOTH = {
    "training_ppl": "mismatch/ppl_train_seq_mean",
    "rollout_ppl": "mismatch/ppl_rollout_seq_mean",
    "ppl_ratio": "mismatch/ppl_ratio_seq_mean",
    "log_ppl_diff": "mismatch/kl_k1_seq_mean",
    "log_ppl_abs_diff": "mismatch/log_ppl_diff_abs_seq_mean",
    "chi2_seq": "mismatch/chi2_seq_product",
}
METRICS = {
    "verl": OF_BOTH
    | {
        "kl": "mismatch/kl_k1_token_mean",
        "k3_kl": "mismatch/kl_k3_token_mean",
        "chi2_token": "mismatch/chi2_token_mean",
        "log_ppl_diff_max": "mismatch/log_ppl_diff_seq_max",
        "log_ppl_diff_min": "mismatch/log_ppl_diff_seq_min",
        "rollout_probs_diff_mean": "mismatch/prob_abs_diff_token_mean",
        "rollout_probs_diff_max": "mismatch/prob_abs_diff_token_max",
        "rollout_probs_diff_std": "mismatch/prob_abs_diff_token_std",
        "rollout_actor_probs_pearson_corr": "mismatch/prob_pearson",
    },
    "slime": OF_BOTH
    | {
        "kl": "mismatch/kl_k1_seq_mean",
        "k3_kl": "mismatch/kl_k3_seq_mean",
        "chi2_token": "mismatch/chi2_token_seq_mean",
        "token/tis_weight_before_bound": "mismatch/ratio_token_seq_mean",
        "sequence/tis_weight_before_bound": "mismatch/ratio_product_seq_mean",
        "geometric/tis_weight_before_bound": "mismatch/ratio_geometric_seq_mean",
    },
}
OVER_LESS_ONE = {"rollout_probs_diff_std": "tokens", "rollout_is_seq_std": "rows"}  # n − 1, not n
# Metrics of one weight per token, by their names; all except the shares are after truncation.
SHARES = {
    "rollout_is_ratio_fraction_high": "weight/share_above_2",
    "rollout_is_ratio_fraction_low": "weight/share_below_half",
    "rollout_is_seq_fraction_high": "weight/seq_share_above_2",
    "rollout_is_seq_fraction_low": "weight/seq_share_below_half",
}
USED = {
    "rollout_is_mean": "weight/used_mean",
    "rollout_is_max": "weight/used_max",
    "rollout_is_min": "weight/used_min",
    "rollout_is_std": "weight/used_std",
    "rollout_is_eff_sample_size": "weight/ess",
}
RAW = {
    "rollout_is_mean": "weight/raw_mean",
    "rollout_is_max": "weight/raw_max",
    "rollout_is_min": "weight/raw_min",
    "rollout_is_std": "weight/raw_std",
    "rollout_is_seq_mean": "weight/raw_seq_mean",
    "rollout_is_seq_max": "weight/raw_seq_max",
    "rollout_is_seq_min": "weight/raw_seq_min",
    "rollout_is_seq_std": "weight/raw_seq_std",
}
WEIGHTS = {2.0: SHARES | USED, 1.2: USED, NO_BOUND: RAW}  # by verl's threshold


def settings() -> dict[str, Any]:
    """Returns everything that their side depends on."""
    losses = {
        name: [
            case.theirs,
            case.settings,
            case.aggregation,
            case.horizon,
            case.weights,
            case.bypass,
        ]
        for name, case in LOSSES.items()
    }
    factors = {name: [case.system, case.settings] for name, case in CORRECTIONS.items()}
    return dict(losses=losses, corrections=factors, thresholds=list(WEIGHTS))
