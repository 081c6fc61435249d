"""Metrics on importance weights before and after bounding, on clipping, and on corrections.

w is the ratio that the objective uses: π_θ/μ_old, or a ratio between other policies in ablations.
Means are over all response tokens unless the name says `seq`. Square brackets contain the names
under which other frameworks record the quantity.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.diagnostics.mismatch import k3
from jaxrl_stable.diagnostics.parts import (
    EffectiveShare,
    Metrics,
    masked_max,
    masked_mean,
    masked_min,
    masked_spread,
)
from jaxrl_stable.importance import bounded, log_ratio, response_mean
from jaxrl_stable.objectives.token_loss import TokenLoss

# A histogram made of ordinary means. Names give bounds in hundredths; lower bounds are inclusive.
BUCKETS = {
    "weight/bucket_000_025": (0.0, 0.25),
    "weight/bucket_025_050": (0.25, 0.5),
    "weight/bucket_050_090": (0.5, 0.9),
    "weight/bucket_090_110": (0.9, 1.1),
    "weight/bucket_110_200": (1.1, 2.0),
    "weight/bucket_200_400": (2.0, 4.0),
    "weight/bucket_400_up": (4.0, math.inf),
}


def weight_metrics(loss: TokenLoss, mask: Bool[Array, "B T"]) -> Metrics:
    """Returns all metrics of `raw_weights`, `used_weights` and `clip_metrics`."""
    return {**raw_weights(loss, mask), **used_weights(loss, mask), **clip_metrics(loss, mask)}


def raw_weights(loss: TokenLoss, mask: Bool[Array, "B T"]) -> Metrics:
    """Returns metrics on w before any bound (except ±20 in log space, to prevent overflow).

    - `weight/raw_mean`, `raw_max`, `raw_min`, `raw_std`: statistics of w
    - `weight/raw_seq_mean`, `raw_seq_max`, `raw_seq_min`, `raw_seq_std`: statistics of each
      response's mean w [verl: `rollout_is_seq_…` without truncation; its std divides by n − 1]
    - `weight/abs_log_mean`: mean |ln w|. If w is π_θ/μ_old, the excess over
      `mismatch/abs_token_mean` comes from the updates [SkyRL, for this w:
      `minibatch_rollout_train_logprobs_abs_diff_mean`]
    - `weight/share_above_2`, `share_below_half`: mean(1[w > 2]), mean(1[w < 1/2]) [verl:
      `rollout_is_ratio_fraction_high`, `…_low` with its usual C = 2]
    - `weight/seq_share_above_2`, `seq_share_below_half`: shares of responses whose mean w is above
      2 or below 1/2 [verl: `rollout_is_seq_fraction_high`, `…_low`]
    - `weight/bucket_LOW_HIGH`: share of tokens with LOW/100 ≤ w < HIGH/100. The shares sum to 1 and
      form a histogram, like open-instruct's `rho_hist`
    """
    log_weight = bounded(loss.log_weight)
    raw, responses = jnp.exp(log_weight), mask.any(-1)
    seq = response_mean(raw, mask)
    return {
        "weight/raw_mean": masked_mean(raw, mask),
        "weight/raw_max": masked_max(raw, mask),
        "weight/raw_min": masked_min(raw, mask),
        "weight/raw_std": masked_spread(raw, mask),
        "weight/raw_seq_mean": masked_mean(seq, responses),
        "weight/raw_seq_max": masked_max(seq, responses),
        "weight/raw_seq_min": masked_min(seq, responses),
        "weight/raw_seq_std": masked_spread(seq, responses),
        "weight/abs_log_mean": masked_mean(jnp.abs(log_weight), mask),
        "weight/share_above_2": masked_mean(raw > 2.0, mask),
        "weight/share_below_half": masked_mean(raw < 0.5, mask),
        "weight/seq_share_above_2": masked_mean(seq > 2.0, responses),
        "weight/seq_share_below_half": masked_mean(seq < 0.5, responses),
        **{
            name: masked_mean((raw >= low) & (raw < high), mask)
            for name, (low, high) in BUCKETS.items()
        },
    }


def used_weights(loss: TokenLoss, mask: Bool[Array, "B T"]) -> Metrics:
    """Returns metrics on w after the bounds or gate: the factor on −Â ∇log π_θ of unclipped tokens.

    - `weight/used_mean`, `used_max`, `used_min`, `used_std`: statistics of this factor [verl:
      `rollout_is_mean`, …, computed after truncation, unlike verl's fractions]
    - `weight/truncated_share`: share of tokens whose weight hit a bound and that keep their
      gradient
    - `weight/ess`: (mean w)² / mean w², the effective sample size as a share (Kish 1965). It is 1
      if all weights are equal [verl: `rollout_is_eff_sample_size`]
    """
    return {
        "weight/used_mean": masked_mean(loss.weight, mask),
        "weight/used_max": masked_max(loss.weight, mask),
        "weight/used_min": masked_min(loss.weight, mask),
        "weight/used_std": masked_spread(loss.weight, mask),
        "weight/truncated_share": masked_mean(loss.truncated, mask),
        "weight/ess": masked_spread(loss.weight, mask, EffectiveShare),
    }


def clip_metrics(loss: TokenLoss, mask: Bool[Array, "B T"]) -> Metrics:
    """Returns metrics on tokens whose gradient is zero because of clipping, by the sign of Â.

    - `clip/high_share`, `clip/low_share`: share of tokens clipped with Â > 0, and with Â < 0 [TRL:
      `clip_ratio/high_mean`, `low_mean`; prime-rl, for a trust region: `is_masked_high`, `…_low`]
    - `clip/region_share`: the sum of the two [TRL: `clip_ratio/region_mean`; prime-rl: `is_masked`;
      verl: `pg_clipfrac` + `pg_clipfrac_lower` (the dual clip's share), except for CISPO and DPPO,
      where verl counts truncated tokens]
    - `clip/high_seq_max`, `clip/low_seq_min`: the largest high share and the smallest low share of
      any response [TRL: `clip_ratio/high_max`, `low_min`]
    - `clip/kl_k3_clipped`, `clip/kl_k3_kept`: mean(w − 1 − ln w) over the clipped tokens and over
      the others [prime-rl, if w is π_θ/μ_old: `masked_mismatch_kl`, `unmasked_mismatch_kl`]
    """
    clipped = loss.clipped_high | loss.clipped_low
    divergence = k3(loss.log_weight)
    responses = mask.any(-1)
    return {
        "clip/high_share": masked_mean(loss.clipped_high, mask),
        "clip/low_share": masked_mean(loss.clipped_low, mask),
        "clip/region_share": masked_mean(clipped, mask),
        "clip/high_seq_max": masked_max(response_mean(loss.clipped_high, mask), responses),
        "clip/low_seq_min": masked_min(response_mean(loss.clipped_low, mask), responses),
        "clip/kl_k3_clipped": masked_mean(divergence, mask & clipped),
        "clip/kl_k3_kept": masked_mean(divergence, mask & ~clipped),
    }


def correction_metrics(
    factor: Float[Array, "B T"],
    logp_old: Float[Array, "B T"],
    logp_rollout: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Metrics:
    """Returns metrics on a correction: a factor on each token's loss, which is 0 on dropped tokens.

    - `correction/factor_mean`: mean over all tokens, including dropped ones [open-instruct:
      `rho_weight`]
    - `correction/dropped_share`: mean(1[factor = 0]) [open-instruct: `rho_drop_frac`; NeMo-RL, if
      the correction drops tokens (IcePop): `is_oob_ratio`]
    - `correction/dropped_response_share`: share of responses whose tokens are all dropped
    - `correction/kl_k3_dropped`, `correction/kl_k3_kept`: mean(e^Δ − 1 − Δ), with Δ = log π_old −
      log μ_old, over the dropped tokens and over the others. Weighted by their shares, the two
      average to `mismatch/kl_k3_token_mean`
    """
    dropped = mask & (factor == 0)
    divergence = k3(log_ratio(logp_old, logp_rollout, mask))
    responses = mask.any(-1)
    return {
        "correction/factor_mean": masked_mean(factor, mask),
        "correction/dropped_share": masked_mean(dropped, mask),
        "correction/dropped_response_share": masked_mean(~(mask & ~dropped).any(-1), responses),
        "correction/kl_k3_dropped": masked_mean(divergence, dropped),
        "correction/kl_k3_kept": masked_mean(divergence, mask & ~dropped),
    }
