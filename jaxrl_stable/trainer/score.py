"""Score: one no-gradient pass of the training program that fixes π_old for a rollout batch.

It also fixes the experts that the updates replay: the sampler's choice (R3) or this pass's own
choice (R2). `Objective.needs_score` says whether a run needs the pass.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import Metrics
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.routing import Routing
from jaxrl_stable.sharding import BATCH, constrain, join_rows
from jaxrl_stable.trainer.batch import TrainBatch, split
from jaxrl_stable.trainer.forward import agreement, policy_log_probs
from jaxrl_stable.trainer.packing import Micro, joined, plan, scan_micro_batches


class Scored(NamedTuple):
    """Result of `score`.

    Attributes:
      logp_old: log π_old of each response token, 0 elsewhere.
      routing: experts to replay in the updates.
      differing_layers: number of MoE layers in which the training router would have chosen other
        experts than the sampler.
      metrics: metrics on the mismatch between sampler and trainer.
    """

    logp_old: Float[Array, "B T"]
    routing: Routing
    differing_layers: Int[Array, "B T"]
    metrics: Metrics


def with_old_policy(batch: TrainBatch, scored: Scored) -> TrainBatch:
    """Returns the batch for the updates, with log π_old and the routing to replay."""
    return dataclasses.replace(batch, logp_old=scored.logp_old, routing=scored.routing)


def score(
    model: Transformer,
    batch: TrainBatch,
    *,
    replay: str,
    micro_batch_size: int,
    temperature: float,
    packed: bool = False,
    mini_batches: int = 1,
) -> Scored:
    """Computes log π_old of a whole rollout batch, in micro-batches shaped as in `update`.

    Under R3 this pass already replays the sampler's experts e^μ. Under R2 it routes freely and
    records the training router's experts e^π_old (https://arxiv.org/abs/2512.01374, §3).

    Args:
      model: the training policy, with the weights that the rollout used.
      batch: the rollout, with its routing.
      replay: "none", "R2" or "R3".
      micro_batch_size: rows per forward pass; must match `update` to get the same rounding.
      temperature: the sampler's temperature.
      packed: whether several responses share one row; see `packing`.
      mini_batches: number of mini-batches; rows are packed within each, as in `update`.
    """

    def one(_: None, micro: Micro) -> tuple[None, tuple]:
        seen = micro.seen
        scored, router = policy_log_probs(
            model, seen, seen.routing if replay == "R3" else None, temperature
        )
        agrees = agreement(seen, router)
        differs = (agrees < 1.0).sum(0) * seen.routing.valid
        experts = router.experts if replay == "R2" else None
        metrics = diagnostics.routing_metrics(agrees, seen.routing.valid)
        return None, (scored.logp, differs, experts, metrics)

    def rows_of(batch: TrainBatch) -> tuple:
        packing = plan(batch.real, micro_batch_size) if packed else None
        _, stacked = scan_micro_batches(one, None, batch, micro_batch_size, packing)
        logp, differs, experts, metrics = stacked
        experts = None if experts is None else joined(experts, packing, axis=1)
        metrics = diagnostics.collapse(metrics)
        return joined(logp, packing), joined(differs, packing), experts, metrics

    if packed:
        logp, differs, experts, metrics = jax.lax.map(rows_of, split(batch, mini_batches))
        join = partial(join_rows, in_order=True)
        logp, differs, metrics = join(logp), join(differs), diagnostics.collapse(metrics)
        experts = None if experts is None else join(experts, axis=1)
    else:
        logp, differs, experts, metrics = rows_of(batch)
    metrics |= diagnostics.mismatch_metrics(logp, batch.logp_rollout, batch.response_mask)
    routing = batch.routing
    if experts is not None:
        routing = Routing(constrain(experts, None, BATCH, "context"), _predicts(batch.real))
    logp, differs = (constrain(x, BATCH, "context") for x in (logp, differs))
    return Scored(logp, routing, differs, metrics)


def _predicts(real: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns a mask of the real tokens that precede another real token, which they predict."""
    return real & jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
