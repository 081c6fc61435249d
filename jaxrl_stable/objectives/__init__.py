"""Objectives: arrays in, per-token loss out, independent of model, tokenizer and config.

All share one signature, `f(logp, logp_old, logp_rollout, advantages, mask, *, …) -> TokenLoss`, and
`aggregate` reduces the result. If a paper has a single old policy, it is `logp_old` here. Call an
objective with `logp_old=logp_rollout` to compute its ratio relative to the sampler ("bypass").
`published.PUBLISHED` lists the constants, advantages and reduction of each paper.
"""

from jaxrl_stable.objectives.aggregation import MODES, aggregate, divide
from jaxrl_stable.objectives.bapo import bapo
from jaxrl_stable.objectives.capo import CapoHead, capo
from jaxrl_stable.objectives.cispo import cispo, minpro
from jaxrl_stable.objectives.cpgd import cpgd
from jaxrl_stable.objectives.dppo import dppo
from jaxrl_stable.objectives.m2po import m2po
from jaxrl_stable.objectives.minirl import minirl
from jaxrl_stable.objectives.ppo import ppo
from jaxrl_stable.objectives.regularizers import KL_ESTIMATORS, kl_penalty
from jaxrl_stable.objectives.reinforce import dro, reinforce
from jaxrl_stable.objectives.sequence import gmpo, gspo, luspo
from jaxrl_stable.objectives.smooth import sapo, vespo
from jaxrl_stable.objectives.token_loss import TokenLoss, traits, traits_of

__all__ = [
    "KL_ESTIMATORS",
    "MODES",
    "CapoHead",
    "TokenLoss",
    "aggregate",
    "bapo",
    "capo",
    "cispo",
    "cpgd",
    "divide",
    "dppo",
    "dro",
    "gmpo",
    "gspo",
    "kl_penalty",
    "luspo",
    "m2po",
    "minirl",
    "minpro",
    "ppo",
    "reinforce",
    "sapo",
    "traits",
    "traits_of",
    "vespo",
]
