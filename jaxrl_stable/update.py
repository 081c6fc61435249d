"""Score and update: one no-gradient pass that fixes π_old, then mini-batch steps on π_θ."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable import diagnostics
from jaxrl_stable.batch import TrainBatch, split
from jaxrl_stable.diagnostics import Mean, Metrics
from jaxrl_stable.model.experts import RouterOutput
from jaxrl_stable.model.head import HeadOutput, next_token_log_probs
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.objective import Decided, Objective
from jaxrl_stable.objectives import divide
from jaxrl_stable.optimizer import TrainState, apply_gradients
from jaxrl_stable.packing import Micro, PackedRows, joined, plan, scan_micro_batches
from jaxrl_stable.rollout import Trajectory
from jaxrl_stable.routing import Routing, overlap
from jaxrl_stable.rows import join_rows
from jaxrl_stable.sharding import BATCH, constrain, constrain_state, expert_parts


class Scored(NamedTuple):
    """Result of `score`.

    Attributes:
      logp_old: log π_old of each response token, 0 elsewhere.
      routing: the experts to replay in the updates.
      differing_layers: MoE layers whose router would have chosen other experts than the sampler.
      metrics: mismatch of sampler and trainer.
    """

    logp_old: Float[Array, "B T"]
    routing: Routing
    differing_layers: Int[Array, "B T"]
    metrics: Metrics


def with_old_policy(batch: TrainBatch, scored: Scored) -> TrainBatch:
    """The batch that the updates see: π_old fixed, routing ready to replay."""
    return dataclasses.replace(batch, logp_old=scored.logp_old, routing=scored.routing)


def policy_log_probs(
    model: Transformer,
    batch: TrainBatch | PackedRows,
    replay: Routing | None,
    temperature: float,
) -> tuple[HeadOutput, RouterOutput]:
    """Log-probability of each response token by the training program, 0 outside the mask."""
    hidden, router = hidden_states(model, batch, replay)
    return response_log_probs(model, hidden, batch, temperature), router


def hidden_states(
    model: Transformer, batch: TrainBatch | Trajectory | PackedRows, replay: Routing | None
) -> tuple[Float[Array, "B T D"], RouterOutput]:
    """The training program's forward pass over whole rows."""
    if isinstance(batch, PackedRows):
        places = batch.positions, batch.segment_ids
    else:
        positions = jnp.maximum(jnp.cumsum(batch.real, axis=-1) - 1, 0)
        places = positions, batch.real.astype(jnp.int32)
    output = model(batch.tokens, *places, replay=replay)
    return output.hidden, output.router


def response_log_probs(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    batch: TrainBatch | Trajectory | PackedRows,
    temperature: float,
) -> HeadOutput:
    """Scores the response tokens; what stands outside the mask is 0.

    Column t of the result scores `tokens[:, t]`, which the hidden state of column t − 1 predicts.
    """
    scored = next_token_log_probs(model, hidden, batch.tokens, batch.prompt_width, temperature)
    return jax.tree.map(lambda x: jnp.where(batch.response_mask, x, 0.0), scored)


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
    """Fixes π_old for a whole rollout batch, in micro-batches shaped like those of the update.

    Under R3 the pass already replays the sampler's experts e^μ. Under R2 it runs on native routing
    and records the training router's e^π_old (arXiv:2512.01374, §3).

    Args:
      model: the training policy, weights as at the rollout.
      batch: the rollout, with its routing.
      replay: "none", "R2" or "R3".
      micro_batch_size: rows at a time; the same as in `update`, so that both are one program.
      temperature: the sampler's.
      packed: see `packing`.
      mini_batches: of the updates; rows are packed within one of them, as `update` packs them.
    """

    def one(_: None, micro: Micro):
        seen = micro.seen
        scored, router = policy_log_probs(
            model, seen, seen.routing if replay == "R3" else None, temperature
        )
        agrees = agreement(seen, router)
        differs = (agrees < 1.0).sum(0) * seen.routing.valid
        experts = router.experts if replay == "R2" else None
        metrics = diagnostics.routing_metrics(agrees, seen.routing.valid)
        return None, (scored.logp, differs, experts, metrics)

    def rows_of(batch: TrainBatch):
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


def update(
    state: TrainState,
    batch: TrainBatch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batch_size: int,
    temperature: float,
    packed: bool = False,
) -> tuple[TrainState, Metrics]:
    """One gradient step on one mini-batch; gradients of micro-batches add up, then divide once.

    An objective that decides on the whole mini-batch (`Objective.whole_batch`) gets it: a forward
    pass first scores all micro-batches, the loss is differentiated by those log-probabilities, and
    the backward passes carry on from there. That costs one forward pass more.

    Args:
      state: weights and moments.
      batch: the mini-batch.
      objective: the loss and its replay.
      optimizer: see `make_optimizer`.
      micro_batch_size: rows of one forward and backward pass.
      temperature: the sampler's.
      packed: see `packing`.

    Raises:
      ValueError: the objective needs a pass of `score`, or a reference, and the batch has none.
    """
    if batch.logp_old is None and objective.needs_old_policy:
        raise ValueError(
            "update: this objective needs the π_old (under R2 the experts too) of a score pass, "
            "but TrainBatch.logp_old is None; call score and with_old_policy first"
        )
    if batch.logp_reference is None and objective.kl_coefficient:
        raise ValueError(
            "update: Objective.kl_coefficient is not 0 but TrainBatch.logp_reference is None; "
            "score the batch with the reference policy first"
        )

    def forward(model: Transformer, micro: Micro) -> tuple[HeadOutput, RouterOutput]:
        routing = None if objective.replay == "none" else micro.seen.routing
        return policy_log_probs(model, micro.seen, routing, temperature)

    def whole(scored: HeadOutput) -> tuple[Float[Array, ""], Metrics]:
        total, decided = objective.total(scored.logp, scored.entropy, batch)
        return total, measure(decided, jax.lax.stop_gradient(scored), batch)

    def loss(model: Transformer, micro: Micro):
        scored, router = forward(model, micro)
        logp, entropy = micro.to_rows(scored)
        if micro.extra is None:
            total, _ = objective.total(logp, entropy, micro.rows)
        else:
            total = (micro.extra.logp * logp + micro.extra.entropy * entropy).sum()
        real, spread = micro.seen.real, expert_parts(model.config.num_experts)
        metrics = diagnostics.load_metrics(router.load, router.confidence, real, spread)
        if packed:
            metrics["packing/fill"] = Mean(real.sum(dtype=jnp.float32), jnp.float32(real.size))
        if batch.logp_old is None:
            valid = micro.seen.routing.valid
            metrics |= diagnostics.routing_metrics(agreement(micro.seen, router), valid)
        return total, (scored, metrics)

    packing = plan(batch.real, micro_batch_size) if packed else None
    run = partial(
        scan_micro_batches, batch=batch, micro_batch_size=micro_batch_size, packing=packing
    )
    pull = None
    if objective.whole_batch and batch.tokens.shape[0] > micro_batch_size:
        _, scored = run(lambda _, micro: (None, forward(state.model, micro)[0]), None)
        scored = jax.tree.map(partial(joined, packing=packing), scored)
        pull, _ = jax.grad(whole, has_aux=True)(scored)

    def accumulate(gradients, micro: Micro):
        (_, outputs), more = jax.value_and_grad(loss, has_aux=True)(state.model, micro)
        # Else libtpu 0.0.42 tries to move reductions of unstacked weights behind the loop, and
        # fails (RET_CHECK in while_loop_all_reduce_code_motion).
        more = jax.lax.optimization_barrier(more)
        return jax.tree.map(jnp.add, gradients, more), outputs

    zeros = constrain_state(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), state.model))
    gradients, (scored, metrics) = run(accumulate, zeros, extra=pull)
    scored = jax.tree.map(partial(joined, packing=packing), scored)
    metrics = diagnostics.collapse(metrics) | whole(scored)[1]
    if packed:
        ran = metrics["packing/fill"].count
        metrics["packing/columns_share"] = Mean(ran, jnp.float32(batch.tokens.size))
    if batch.logp_old is None:
        mismatch = scored.logp, batch.logp_rollout, batch.response_mask
        metrics |= diagnostics.mismatch_metrics(*mismatch)
    gradients = jax.tree.map(lambda g: divide(g, metrics["loss"].count), gradients)
    state, norm = apply_gradients(state, gradients, optimizer)
    return state, metrics | {"gradient/norm": Mean(norm, jnp.ones(()))}


def measure(decided: Decided, scored: HeadOutput, batch: TrainBatch) -> Metrics:
    """Metrics of a loss that was decided on some rows."""
    mask, logp = batch.response_mask, scored.logp
    metrics = {
        "loss": Mean(decided.total, decided.count),
        "entropy": diagnostics.masked_mean(scored.entropy, mask),
        **diagnostics.weight_metrics(decided.token_loss, mask),
        **diagnostics.validity_metrics(
            logp, batch.logp_old, batch.logp_rollout, batch.advantages, mask
        ),
    }
    if decided.factor is not None:
        old = logp if batch.logp_old is None else batch.logp_old
        metrics |= diagnostics.correction_metrics(decided.factor, old, batch.logp_rollout, mask)
    if batch.logp_old is not None:
        metrics |= diagnostics.staleness_metrics(logp, batch.logp_old, mask)
    if decided.kl is not None:
        metrics["reference/kl"] = diagnostics.masked_mean(decided.kl, mask)
    return metrics


def _predicts(real: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Real tokens that another one follows: the last of a row predicts nothing that is scored."""
    return real & jnp.pad(real[:, 1:], ((0, 0), (0, 1)))


def agreement(batch: TrainBatch | PackedRows, router: RouterOutput) -> Float[Array, "L B T"]:
    """Share of the batch's K experts that the training router would have chosen itself."""
    return overlap(batch.routing.experts, router.live)
