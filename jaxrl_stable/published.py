"""Recipes as published: token loss and constants, advantages, reduction and corrections.

`PUBLISHED["gspo"](logp, logp_old, logp_rollout, advantages, mask)` computes the whole loss.
`experiments/recipes/*.gin` contains the same recipes as experiments, with their run settings (a KL
term, dynamic sampling, the number of updates). Constants come from the source; if the source gives
none, `note` says where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from jaxrl_stable import advantages, corrections, objectives
from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.objectives import TokenLoss


class Published(NamedTuple):
    """One recipe.

    Attributes:
      source: paper or code that the form is taken from.
      token_loss: function from `objectives` with the published constants.
      advantages: function from `jaxrl_stable.advantages` with the published constants.
      aggregation: one of `objectives.MODES`; "seq-mean-token-sum-norm" needs a horizon.
      corrections: functions from `jaxrl_stable.corrections` with the published constants.
      note: origin of anything that is not from the source.
    """

    source: str
    token_loss: Callable[..., TokenLoss]
    advantages: Callable[..., Array] = advantages.standardized
    aggregation: str = "token-mean"
    corrections: tuple[Callable[..., Array], ...] = ()
    note: str = ""

    def __call__(
        self,
        logp: Float[Array, "B T"],
        logp_old: Float[Array, "B T"] | None,
        logp_rollout: Float[Array, "B T"],
        advantages: Float[Array, "B"],
        mask: Bool[Array, "B T"],
        horizon: float | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the loss as (total, count); see `objectives.aggregate`."""
        arrays = logp, logp_old, logp_rollout, advantages, mask
        out = self.token_loss(*arrays)
        for correction in self.corrections:
            out = corrections.correct(out, correction(*arrays))
        return objectives.aggregate(out.loss, mask, self.aggregation, horizon)


SUM, MEAN = "seq-mean-token-sum", "seq-mean-token-mean"
_loo, _centered = advantages.leave_one_out, advantages.centered
_dapo = partial(objectives.ppo, clip_high=0.28)

PUBLISHED: Mapping[str, Published] = {
    "minirl": Published("arXiv:2512.01374", objectives.minirl, _centered, SUM),
    "reinforce": Published("Williams 1992", objectives.reinforce, _centered, SUM),
    "rloo": Published("arXiv:2402.14740", objectives.reinforce, _loo, SUM),
    "reinforce_plus_plus": Published(
        "arXiv:2501.03262", objectives.ppo, advantages.reinforce_plus_plus
    ),
    "ppo": Published("arXiv:1707.06347", partial(objectives.ppo, dual_clip=3.0), note="verl"),
    "grpo": Published("arXiv:2402.03300", objectives.ppo, aggregation=MEAN),
    "dr_grpo": Published("arXiv:2503.20783", objectives.ppo, _centered, "seq-mean-token-sum-norm"),
    "dapo": Published("arXiv:2503.14476", _dapo),
    "decoupled_ppo": Published(
        "arXiv:2505.24298",
        objectives.ppo,
        corrections=(partial(corrections.token_tis, cap=5.0),),
        note="our cap",
    ),
    "cispo": Published("arXiv:2506.13585", objectives.cispo, note="bounds from arXiv:2510.13786"),
    "gspo": Published("arXiv:2507.18071", objectives.gspo, aggregation=MEAN),
    "gspo_token": Published(
        "arXiv:2507.18071", partial(objectives.gspo, form="token"), aggregation=MEAN
    ),
    "luspo": Published("TRL", objectives.luspo, aggregation=MEAN, note="paper not read"),
    "sapo": Published("arXiv:2511.20347", objectives.sapo, aggregation=MEAN),
    "gmpo": Published("arXiv:2507.20673", objectives.gmpo, aggregation=MEAN),
    "dppo_tv": Published("arXiv:2602.04879", objectives.dppo, _centered),
    "dppo_kl": Published(
        "arXiv:2602.04879", partial(objectives.dppo, divergence="kl", threshold=0.05), _centered
    ),
    "m2po": Published("arXiv:2510.01161", objectives.m2po, note="AReaL's form, our threshold"),
    "vespo": Published("arXiv:2602.10693", objectives.vespo, note="constants from authors' code"),
    "minpro": Published("arXiv:2601.22718", objectives.minpro, note="our bounds (CISPO's)"),
    "bapo": Published("arXiv:2510.18927", objectives.bapo, note="form from a note on the paper"),
    "bapo_code": Published(
        "WooooDyy/BAPO",
        partial(
            objectives.bapo,
            form="code",
            low=(0.6, 0.8, 0.05),
            high=(1.2, 2.0, 0.05),
            target=1.0,
            dual_clip=3.0,
        ),
    ),
    "cpgd": Published(
        "arXiv:2505.12504",
        objectives.cpgd,
        advantages.clip_filter,
        note="siiRL's form and constants",
    ),
    "tis": Published("Yao et al. 2025", _dapo, corrections=(corrections.token_tis,)),
    "icepop": Published("Ring-1T", _dapo, corrections=(corrections.icepop,), note="verl's bounds"),
    "geometric_mask": Published(
        "SkyRL",
        _dapo,
        corrections=(partial(corrections.geometric_mask, low=0.99, high=1.01), corrections.veto),
    ),
    "off_policy_sequence_mask": Published(
        "arXiv:2512.02556",
        objectives.ppo,
        aggregation=MEAN,
        corrections=(corrections.off_policy_sequence_mask,),
        note="threshold from TRL's example",
    ),
    "dro": Published("verl", objectives.dro, note="β from verl's test; no published default"),
}
