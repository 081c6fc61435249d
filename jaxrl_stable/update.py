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
from jaxrl_stable.diagnostics import Mean, Metrics
from jaxrl_stable.model.experts import RouterOutput
from jaxrl_stable.model.head import HeadOutput, token_log_probs
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.objective import Decided, Objective
from jaxrl_stable.objectives import divide
from jaxrl_stable.optimizer import TrainState, apply_gradients
from jaxrl_stable.rollout import Trajectory
from jaxrl_stable.routing import Routing, overlap
from jaxrl_stable.sharding import constrain_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """What an update needs of a rollout; aligned as in `Trajectory`.

    Attributes:
      tokens, real, response_mask, logp_rollout: see `Trajectory`.
      advantages: one per response.
      routing: the experts to replay, or those of the rollout to compare with.
      logp_old: log π_old; None when the update itself stands for it (one update per rollout).
      logp_reference: log-probabilities of the policy that a KL term keeps to; None without one.
      prompt_width: P, static.
    """

    tokens: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    logp_rollout: Float[Array, "B T"]
    advantages: Float[Array, "B"]
    routing: Routing
    logp_old: Float[Array, "B T"] | None
    logp_reference: Float[Array, "B T"] | None
    prompt_width: int = dataclasses.field(metadata=dict(static=True))


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


def make_batch(trajectory: Trajectory, advantages: Float[Array, "B"]) -> TrainBatch:
    """Rollout and advantages, before `score`."""
    return TrainBatch(
        tokens=trajectory.tokens,
        real=trajectory.real,
        response_mask=trajectory.response_mask,
        logp_rollout=trajectory.logp_rollout,
        advantages=advantages,
        routing=trajectory.routing,
        logp_old=None,
        logp_reference=None,
        prompt_width=trajectory.prompt_width,
    )


def with_old_policy(batch: TrainBatch, scored: Scored) -> TrainBatch:
    """The batch that the updates see: π_old fixed, routing ready to replay."""
    return dataclasses.replace(batch, logp_old=scored.logp_old, routing=scored.routing)


def split(batch: TrainBatch, parts: int) -> TrainBatch:
    """Cuts the rows into `parts` equal runs: every array gets a leading axis of that size."""
    if batch.routing is None:
        raise ValueError("TrainBatch.routing is None; without it there is nothing to replay")

    rows = partial(_split_rows, parts=parts)
    routing = Routing(rows(batch.routing.experts, axis=1), rows(batch.routing.valid))
    others = dataclasses.replace(batch, routing=None)
    return dataclasses.replace(jax.tree.map(rows, others), routing=routing)


def _split_rows(x: Array, parts: int, axis: int = 0) -> Array:
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return constrain_rows(jnp.moveaxis(x.reshape(shape), axis, 0), axis + 1)


def policy_log_probs(
    model: Transformer, batch: TrainBatch, replay: Routing | None, temperature: float
) -> tuple[HeadOutput, RouterOutput]:
    """Log-probability of each response token by the training program, 0 outside the mask."""
    hidden, router = hidden_states(model, batch, replay)
    return response_log_probs(model, hidden, batch, temperature), router


def hidden_states(
    model: Transformer, batch: TrainBatch | Trajectory, replay: Routing | None
) -> tuple[Float[Array, "B T D"], RouterOutput]:
    """The training program's forward pass over whole rows."""
    positions = jnp.maximum(jnp.cumsum(batch.real, axis=-1) - 1, 0)
    output = model(batch.tokens, positions, batch.real.astype(jnp.int32), replay=replay)
    return output.hidden, output.router


def response_log_probs(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    batch: TrainBatch | Trajectory,
    temperature: float,
) -> HeadOutput:
    """Scores the response tokens; what stands outside the mask is 0.

    Column t of the result scores `tokens[:, t]`, which the hidden state of column t − 1 predicts.
    """
    first = batch.prompt_width
    scored = token_log_probs(model, hidden[:, first - 1 : -1], batch.tokens[:, first:], temperature)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (first, 0))), scored)
    return jax.tree.map(lambda x: jnp.where(batch.response_mask, x, 0.0), padded)


def score(
    model: Transformer,
    batch: TrainBatch,
    *,
    replay: str,
    micro_batch_size: int,
    temperature: float,
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
    """

    def one(micro: TrainBatch):
        routing = micro.routing if replay == "R3" else None
        scored, router = policy_log_probs(model, micro, routing, temperature)
        differs = (agreement(micro, router) < 1.0).sum(0) * micro.routing.valid
        return scored.logp, router.experts, differs, mismatch(micro, scored.logp, router)

    parts = batch.tokens.shape[0] // micro_batch_size
    logp, experts, differs, metrics = jax.lax.map(one, split(batch, parts))
    routing = batch.routing
    if replay == "R2":
        experts = jnp.moveaxis(experts, 0, 1).reshape(batch.routing.experts.shape)
        routing = Routing(experts, _predicts(batch.real))
    shape = batch.tokens.shape
    return Scored(
        logp.reshape(shape), routing, differs.reshape(shape), diagnostics.collapse(metrics)
    )


def update(
    state: TrainState,
    batch: TrainBatch,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batch_size: int,
    temperature: float,
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

    def forward(model: Transformer, micro: TrainBatch) -> tuple[HeadOutput, RouterOutput]:
        routing = None if objective.replay == "none" else micro.routing
        return policy_log_probs(model, micro, routing, temperature)

    def objective_of(scored: HeadOutput, rows: TrainBatch):
        total, decided = objective.total(scored.logp, scored.entropy, rows)
        return total, measure(decided, jax.lax.stop_gradient(scored), rows)

    def loss(model: Transformer, micro: TrainBatch, pull: HeadOutput | None):
        scored, router = forward(model, micro)
        if pull is None:
            total, metrics = objective_of(scored, micro)
        else:
            total = sum((weight * x).sum() for weight, x in zip(pull, scored, strict=True))
            metrics = {}
        metrics |= diagnostics.load_metrics(router.load, router.confidence, micro.real)
        if micro.logp_old is None:
            metrics |= mismatch(micro, jax.lax.stop_gradient(scored.logp), router)
        return total, metrics

    parts = batch.tokens.shape[0] // micro_batch_size
    micro_batches, pulls, whole = split(batch, parts), None, {}
    if objective.whole_batch and parts > 1:
        scored = jax.lax.map(lambda micro: forward(state.model, micro)[0], micro_batches)
        scored = jax.tree.map(lambda x: x.reshape(batch.tokens.shape), scored)
        pull, whole = jax.grad(objective_of, has_aux=True)(scored, batch)
        pulls = jax.tree.map(partial(_split_rows, parts=parts), pull)

    def accumulate(gradients, micro):
        (_, metrics), more = jax.value_and_grad(loss, has_aux=True)(state.model, *micro)
        return jax.tree.map(jnp.add, gradients, more), metrics

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), state.model)
    gradients, metrics = jax.lax.scan(accumulate, zeros, (micro_batches, pulls))
    metrics = diagnostics.collapse(metrics) | whole
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


def mismatch(batch: TrainBatch, logp_old: Float[Array, "B T"], router: RouterOutput) -> Metrics:
    """How far the sampler was from the training program at the same weights."""
    return {
        **diagnostics.mismatch_metrics(logp_old, batch.logp_rollout, batch.response_mask),
        **diagnostics.routing_metrics(agreement(batch, router), batch.routing.valid),
    }


def _predicts(real: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Real tokens that another one follows: the last of a row predicts nothing that is scored."""
    return real & jnp.pad(real[:, 1:], ((0, 0), (0, 1)))


def agreement(batch: TrainBatch, router: RouterOutput) -> Float[Array, "L B T"]:
    """Share of the batch's K experts that the training router would have chosen itself."""
    return overlap(batch.routing.experts, router.live)
