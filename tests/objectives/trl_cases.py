"""The policy losses and advantages of TRL's trainers, each with our equivalent.

`LOSSES` and `ADVANTAGES` list the settings on both sides. `trl_ours.py` runs our functions on a
batch; `trl_theirs.py` runs TRL's own code, and only it needs torch and trl.

TRL has these and we do not: RLOO's ratio away from 1 (the product over the response, clipped), a
gate on the ratio of the response (`sapo` with `importance_sampling_level="sequence"`, and the
weight of the KL), `token_mask` inside VESPO, the entropy bonus, and `top_entropy_quantile`, which
keeps the tokens of highest entropy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable import corrections
from jaxrl_stable.advantages import centered, leave_one_out, standardized
from jaxrl_stable.objectives import (
    cispo,
    gmpo,
    gspo,
    luspo,
    ppo,
    reinforce,
    sapo,
    vespo,
)

ROWS, WIDTH, GROUP = 8, 8, 4
TOLERANCES = {"float64": 1e-9, "float32": 2e-6}  # relative to the largest entry
EOS, PAD, WORD = 1, 0, 2  # TRL reads only the last token of a response
WEIGHTS = (1.0, 0.5)  # of the two rewards
LENGTHS = np.arange(16)
OVERLONG = ((12, 5), (12, 12), (12, 0))  # limit and buffer of the punishment of LENGTHS
# By TRL's names: the metrics that we define identically.
METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
    "kl",
    "sampling/importance_sampling_ratio/mean",
)


class Batch(NamedTuple):
    """Inputs of both sides, in float64."""

    logp: np.ndarray  # [ROWS, WIDTH]; log π_θ, then the other policies
    old: np.ndarray
    rollout: np.ndarray
    reference: np.ndarray
    lengths: np.ndarray  # [ROWS]
    spoken: np.ndarray  # [ROWS, WIDTH]; False where a tool wrote
    finished: np.ndarray  # [ROWS]; False where the response was cut off
    advantages: np.ndarray  # [ROWS]
    token_advantages: np.ndarray  # [ROWS, WIDTH]
    rewards: np.ndarray  # [ROWS, 2]
    scored: np.ndarray  # [ROWS]; False where no reward could be found

    @property
    def mask(self) -> np.ndarray:
        return np.arange(WIDTH) < self.lengths[:, None]


def draw(seed: int) -> Batch:
    """Makes rows that have hardly moved, for clips at 1e-4, and rows that have moved far."""
    rng = np.random.default_rng(seed)
    shape = ROWS, WIDTH
    rollout = rng.uniform(-6, -3, shape)
    old = rollout + rng.choice([0.02, 0.4], (ROWS, 1)) * rng.normal(size=shape)
    logp = old + rng.choice([3e-4, 0.2, 0.6], (ROWS, 1)) * rng.normal(size=shape)
    failures = (GROUP - 1 if seed == 0 else 1), 1  # of the checker, in the two groups
    scored = rng.permuted(np.arange(GROUP) >= np.reshape(failures, (2, 1)), axis=1).reshape(ROWS)
    lengths = rng.integers(1, WIDTH + 1, ROWS)
    lengths[rng.integers(ROWS)] = WIDTH  # TRL pads to the longest
    advantages = rng.normal(size=ROWS)
    advantages[:2] = 0.7, -0.6
    rewards = np.stack([rng.permuted(np.arange(ROWS) % 3 == 0), rng.uniform(size=ROWS)], axis=1)
    return Batch(
        logp=logp,
        old=old,
        rollout=rollout,
        reference=logp + 0.5 * rng.normal(size=shape),
        lengths=lengths,
        spoken=(np.arange(WIDTH) == 0) | (rng.random(shape) < 0.6),
        finished=rng.permuted(np.arange(ROWS) > 1),
        advantages=advantages,
        token_advantages=advantages[:, None] + rng.normal(size=shape),
        rewards=rewards.astype(float),
        scored=scored,
    )


class Loss(NamedTuple):
    """One loss, with our settings and TRL's.

    Attributes:
      objective, options: our objective and its options.
      trl: arguments of TRL's config; others have their defaults.
      aggregation: our aggregation; `horizon` is TRL's `max_completion_length`.
      corrections: our corrections, each with its options.
      kl: weight of our `kl_penalty`; None without one.
      unbiased_kl: whether the KL is multiplied by r.
      trainer: name of TRL's trainer.
      off_policy: False if π_old is π_θ.
      token_advantages: whether there is one advantage per token.
      tools: whether some tokens are not the policy's.
      all_rows: whether TRL's denominator counts the responses that it masked; ours does not.
      same_value: False if one side's loss is r Â and the other's is Â log π_θ.
    """

    objective: Callable
    options: dict[str, Any]
    trl: dict[str, Any]
    aggregation: str = "token-mean"
    corrections: tuple[tuple[Callable, dict[str, Any]], ...] = ()
    kl: float | None = None
    unbiased_kl: bool = False
    trainer: str = "GRPO"
    off_policy: bool = True
    token_advantages: bool = False
    tools: bool = False
    all_rows: bool = False
    same_value: bool = True


def also(case: Loss, trl: dict[str, Any], **changes) -> Loss:
    """Returns the case with more of TRL's settings."""
    return case._replace(trl=case.trl | trl, **changes)


def sampler(mode: str, smallest: float | None, largest: float | None) -> dict[str, Any]:
    """Returns TRL's settings that correct the mismatch of sampler and trainer."""
    return dict(
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=smallest,
        vllm_importance_sampling_clip_max=largest,
    )


def corrected(case: Loss, trl: dict[str, Any], ours: Callable, **options) -> Loss:
    """Returns the case with `trl` from `sampler`, and with our equivalent factor.

    TRL multiplies it into min(r Â, clip(r) Â), as our corrections do.
    """
    return also(case, trl, corrections=(*case.corrections, (ours, options)))


MEAN = "seq-mean-token-mean"
SEQUENCE = dict(importance_sampling_level="sequence")
GRPO = Loss(ppo, {}, dict(loss_type="grpo"), MEAN)
DAPO = Loss(
    ppo,
    dict(clip_low=0.2, clip_high=0.28),
    dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28),
)
GSPO = Loss(
    gspo,
    dict(clip_low=3e-4, clip_high=4e-4),
    dict(loss_type="grpo", epsilon=3e-4, epsilon_high=4e-4, **SEQUENCE),
    MEAN,
)
LUSPO = Loss(
    luspo,
    dict(clip_low=2e-3, clip_high=2.5e-3),
    dict(loss_type="luspo", epsilon=2e-3, epsilon_high=2.5e-3, **SEQUENCE),
    MEAN,
)
# TRL's bound is absolute here, without a lower one.
CISPO = Loss(cispo, dict(clip_high=0.3), dict(loss_type="cispo", epsilon_high=1.3))
SAPO = Loss(sapo, {}, dict(loss_type="sapo"), MEAN)
VESPO = Loss(vespo, {}, dict(loss_type="vespo"))
GMPO = Loss(gmpo, {}, {}, MEAN, trainer="GMPO")
STALE = (corrections.off_policy_sequence_mask, dict(delta=0.03))
CUT = dict(mask_truncated_completions=True)

LOSSES = {
    "grpo": GRPO,
    "bnpo": Loss(ppo, {}, dict(loss_type="bnpo")),
    "dr_grpo": Loss(
        ppo, {}, dict(loss_type="dr_grpo", max_completion_length=16), "seq-mean-token-sum-norm"
    ),
    "dapo": DAPO,
    "asynchronous": DAPO._replace(trl=dict(epsilon=0.2, epsilon_high=0.28), trainer="AsyncGRPO"),
    "one update": DAPO._replace(off_policy=False),
    "advantage per token": DAPO._replace(token_advantages=True),
    "dual clip": also(GRPO, dict(delta=1.4), options=dict(dual_clip=1.4)),
    "gspo": GSPO,
    "gspo, form of tokens": GSPO._replace(options=dict(form="token", **GSPO.options)),
    "gspo, mean of tokens": also(GSPO, dict(loss_type="dapo"), aggregation="token-mean"),
    "luspo": LUSPO,
    "gmpo": GMPO,
    "gmpo, other bounds": GMPO._replace(
        options=dict(clip_low=0.1, clip_high=0.3), trl=dict(epsilon=0.1, epsilon_high=0.3)
    ),
    "cispo": CISPO,
    "sapo": SAPO,
    "sapo, other temperatures": also(
        SAPO,
        dict(sapo_temperature_pos=3.0, sapo_temperature_neg=5.0),
        options=dict(temperature_high=3.0, temperature_low=5.0),
    ),
    "vespo": VESPO,
    "vespo, other gates": also(
        VESPO,
        dict(vespo_k_pos=2.0, vespo_lambda_pos=1.5, vespo_k_neg=4.0, vespo_lambda_neg=2.5),
        options=dict(positive=(2.0, 1.5), negative=(4.0, 2.5)),
    ),
    # RLOO's ratio is the product over the response, which is 1 before any update.
    "rloo": Loss(
        reinforce,
        {},
        {},
        "seq-mean-token-sum",
        trainer="RLOO",
        off_policy=False,
        same_value=False,
    ),
    "token_truncate": corrected(
        DAPO, sampler("token_truncate", None, 1.2), corrections.token_tis, cap=1.2
    ),
    "token_truncate, two bounds": corrected(
        DAPO, sampler("token_truncate", 0.8, 1.2), corrections.token_tis, cap=1.2, floor=0.8
    ),
    "token_mask": corrected(
        DAPO, sampler("token_mask", None, 1.4), corrections.icepop, low=0.0, high=1.4
    ),
    "token_mask, two bounds": corrected(
        DAPO, sampler("token_mask", 0.7, 1.4), corrections.icepop, low=0.7, high=1.4
    ),
    "sequence_truncate": corrected(
        DAPO, sampler("sequence_truncate", None, 1.1), corrections.sequence_tis, cap=1.1
    ),
    "sequence_mask": corrected(
        DAPO, sampler("sequence_mask", None, 1.5), corrections.sequence_mis, high=1.5
    ),
    "sequence_mask, two bounds": corrected(
        DAPO, sampler("sequence_mask", 0.6, 1.5), corrections.sequence_mis, low=0.6, high=1.5
    ),
    "gspo, sequence_mask": corrected(
        GSPO, sampler("sequence_mask", 0.6, 1.5), corrections.sequence_mis, low=0.6, high=1.5
    ),
    "cispo, token_truncate": corrected(
        CISPO, sampler("token_truncate", None, 1.2), corrections.token_tis, cap=1.2
    ),
    # Only here does TRL multiply the truncated weights into the ratio of the response.
    "vespo, token_truncate": also(
        VESPO, sampler("token_truncate", None, 1.1), options=dict(tis_cap=1.1)
    ),
    "off-policy mask": also(
        DAPO,
        dict(
            off_policy_mask_threshold=0.03,
            use_vllm=True,
            vllm_importance_sampling_correction=False,
        ),
        corrections=(STALE,),
    ),
    "off-policy mask, sequence_truncate": corrected(
        also(SAPO, dict(off_policy_mask_threshold=0.03), corrections=(STALE,)),
        sampler("sequence_truncate", None, 1.1),
        corrections.sequence_tis,
        cap=1.1,
    ),
    "kl": also(GRPO, dict(beta=0.3, use_bias_correction_kl=False), kl=0.3),
    "kl, unbiased": also(GRPO, dict(beta=0.3), kl=0.3, unbiased_kl=True),
    # Neither the clip nor a correction reaches the distance.
    "kl, token_mask": also(
        corrected(DAPO, sampler("token_mask", 0.7, 1.4), corrections.icepop, low=0.7, high=1.4),
        dict(beta=0.3, use_bias_correction_kl=False),
        kl=0.3,
    ),
    "tokens of tools": corrected(
        GSPO._replace(tools=True),
        sampler("sequence_mask", 0.6, 1.5),
        corrections.sequence_mis,
        low=0.6,
        high=1.5,
    ),
    "cut-off responses": also(DAPO, CUT),
    "cut-off responses, grpo": also(GRPO, CUT, all_rows=True),
}


class Advantage(NamedTuple):
    """One advantage estimator.

    Attributes:
      ours: function of rewards [ROWS, 2], groups, and which rewards exist.
      trl: arguments of TRL's config.
      trainer: name of TRL's trainer.
      all_scored: whether every response has its rewards.
      kl: weight of the distance to the reference that is subtracted from the reward.
    """

    ours: Callable
    trl: dict[str, Any]
    trainer: str = "GRPO"
    all_scored: bool = True
    kl: float = 0.0


def total(rewards: jax.Array) -> jax.Array:
    return rewards @ jnp.asarray(WEIGHTS)


def in_batch(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns (x − mean) / (std + 1e-4) over all valid entries."""
    return standardized(x, jnp.zeros(len(x), int), valid, eps=1e-4)


def gdpo(rewards, groups, valid):
    """arXiv:2601.05242: every reward is standardised in its group, their sum in the batch."""
    each = [standardized(reward, groups, valid, eps=1e-4) for reward in rewards.T]
    return in_batch(total(jnp.stack(each, axis=1)), valid)


def standardized_rloo(rewards, groups, valid):
    """A response alone in its group lacks a baseline, and TRL excludes it from the statistics."""
    compared = valid & (jnp.bincount(groups, valid + 0.0, length=ROWS)[groups] > 1)
    return in_batch(leave_one_out(total(rewards), groups, valid), compared)


RLOO = Advantage(lambda x, *of: leave_one_out(total(x), *of), dict(beta=0.0), "RLOO")
ADVANTAGES = {
    "none": Advantage(lambda x, *of: centered(total(x), *of), dict(scale_rewards="none")),
    "group": Advantage(lambda x, *of: standardized(total(x), *of, eps=1e-4), {}),
    "batch": Advantage(
        lambda x, *of: standardized(total(x), *of, scale="batch", eps=1e-4),
        dict(scale_rewards="batch"),
    ),
    "gdpo": Advantage(gdpo, dict(multi_objective_aggregation="normalize_then_sum")),
    "rloo": RLOO,
    "rloo, kl": RLOO._replace(trl=dict(beta=0.05), kl=0.05),
    "rloo, standardised": Advantage(
        standardized_rloo, dict(beta=0.0, normalize_advantages=True), "RLOO"
    ),
    "asynchronous": Advantage(
        lambda x, *of: standardized(x.sum(1), *of, ddof=0, eps=1e-8), {}, "AsyncGRPO"
    ),
}
ADVANTAGES |= {
    f"{name}, some not scored": case._replace(all_scored=False) for name, case in ADVANTAGES.items()
}
