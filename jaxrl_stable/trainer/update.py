"""Update: one gradient step of π_θ on one mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import Mean, Metrics
from jaxrl_stable.model.experts import RouterOutput
from jaxrl_stable.model.head import HeadOutput
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.objective import LossDetails, ObjectiveLike
from jaxrl_stable.objectives import divide
from jaxrl_stable.sharding import constrain_state, expert_parts
from jaxrl_stable.trainer.batch import TrainBatch
from jaxrl_stable.trainer.forward import agreement, policy_log_probs
from jaxrl_stable.trainer.optimizer import TrainState, all_zero, apply_gradients
from jaxrl_stable.trainer.packing import Micro, Packing, joined, plan, scan_micro_batches


def update(
    state: TrainState,
    batch: TrainBatch,
    *,
    objective: ObjectiveLike,
    optimizer: optax.GradientTransformation,
    micro_batch_size: int,
    temperature: float,
    packed: bool = False,
) -> tuple[TrainState, Metrics]:
    """Takes one gradient step; micro-batch gradients are summed and divided once, at the end.

    Args:
      state: weights and moments.
      batch: the mini-batch.
      objective: loss, corrections and replay; static.
      optimizer: from `make_optimizer`; static.
      micro_batch_size: rows per forward and backward pass.
      temperature: the sampler's temperature.
      packed: whether several responses share one row; see `packing`.

    Returns:
      The next state, and this step's metrics as parts that combine exactly (`diagnostics.merge`).

    Raises:
      ValueError: if the objective needs log π_old or reference log-probabilities and the batch
        lacks them.
    """
    _check(batch, objective)
    packing = plan(batch.real, micro_batch_size) if packed else None
    gradients, scored, metrics = _gradients(
        state.model, batch, objective, micro_batch_size, temperature, packing
    )
    # Evaluate the objective again on the whole mini-batch, for the metrics and the count.
    _, details = objective.total(scored.logp, scored.entropy, batch)
    metrics |= measure(details, scored, batch)
    gradients = jax.tree.map(lambda g: divide(g, metrics["loss"].count), gradients)
    state, norm = apply_gradients(state, gradients, optimizer)
    one = jnp.ones(())
    metrics["gradient/norm"] = Mean(norm, one)
    metrics["gradient/zero_share"] = Mean(all_zero(gradients).astype(jnp.float32), one)
    return state, metrics


def _check(batch: TrainBatch, objective: ObjectiveLike) -> None:
    if batch.logp_old is None and objective.needs_old_policy:
        raise ValueError(
            "update: this objective needs log π_old (and experts, under R2) from a score pass, "
            "but TrainBatch.logp_old is None; call score and with_old_policy first"
        )
    if batch.logp_reference is None and objective.kl_coefficient:
        raise ValueError(
            "update: Objective.kl_coefficient is not 0 but TrainBatch.logp_reference is None; "
            "score the batch with the reference policy first"
        )


def _gradients(
    model: Transformer,
    batch: TrainBatch,
    objective: ObjectiveLike,
    micro_batch_size: int,
    temperature: float,
    packing: Packing | None,
) -> tuple[Transformer, HeadOutput, Metrics]:
    """Sums the gradients of all micro-batches, without dividing by the loss's count.

    Returns:
      The gradients in float32, the log-probabilities and entropies `[B, T]`, and metrics from the
      forward passes.
    """

    def forward(model: Transformer, micro: Micro) -> tuple[HeadOutput, RouterOutput]:
        routing = None if objective.replay == "none" else micro.seen.routing
        return policy_log_probs(model, micro.seen, routing, temperature)

    def loss(model: Transformer, micro: Micro) -> tuple[Float[Array, ""], Any]:
        scored, router = forward(model, micro)
        logp, entropy = micro.to_rows(scored)
        if micro.cotangents is None:
            total, _ = objective.total(logp, entropy, micro.rows)
        else:
            given = micro.cotangents
            total = (given.logp * logp + given.entropy * entropy).sum()
        return total, (scored, _forward_metrics(model, micro, router, packing, batch))

    def accumulate(gradients: Transformer, micro: Micro) -> tuple[Transformer, Any]:
        (_, outputs), more = jax.value_and_grad(loss, has_aux=True)(model, micro)
        # Without the barrier libtpu 0.0.42 tries to move reductions of unstacked weights out of the
        # loop, and fails (RET_CHECK in while_loop_all_reduce_code_motion).
        more = jax.lax.optimization_barrier(more)
        return jax.tree.map(jnp.add, gradients, more), outputs

    scan = partial(
        scan_micro_batches, batch=batch, micro_batch_size=micro_batch_size, packing=packing
    )
    cotangents = None
    if objective.whole_batch and batch.tokens.shape[0] > micro_batch_size:
        cotangents = _whole_batch_cotangents(
            lambda micro: forward(model, micro)[0], batch, objective, scan, packing
        )
    zeros = constrain_state(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), model))
    gradients, (scored, metrics) = scan(accumulate, zeros, cotangents=cotangents)
    scored = jax.tree.map(partial(joined, packing=packing), scored)
    metrics = diagnostics.collapse(metrics)
    if packing is not None:
        ran = metrics["packing/fill"].count
        metrics["packing/columns_share"] = Mean(ran, jnp.float32(batch.tokens.size))
    if batch.logp_old is None:
        mismatch = scored.logp, batch.logp_rollout, batch.response_mask
        metrics |= diagnostics.mismatch_metrics(*mismatch)
    return gradients, scored, metrics


def _whole_batch_cotangents(
    forward: Callable[[Micro], HeadOutput],
    batch: TrainBatch,
    objective: ObjectiveLike,
    scan: Callable[..., tuple[Any, Any]],
    packing: Packing | None,
) -> HeadOutput:
    """Differentiates an objective that needs the whole mini-batch (`Objective.whole_batch`).

    A forward pass first scores all micro-batches. The loss is then differentiated with respect to
    the resulting log-probabilities and entropies, and the backward passes start from these
    gradients. This costs one extra forward pass.
    """
    _, scored = scan(lambda _, micro: (None, forward(micro)), None)
    scored = jax.tree.map(partial(joined, packing=packing), scored)
    return jax.grad(lambda s: objective.total(s.logp, s.entropy, batch)[0])(scored)


def _forward_metrics(
    model: Transformer,
    micro: Micro,
    router: RouterOutput,
    packing: Packing | None,
    batch: TrainBatch,
) -> Metrics:
    """Returns metrics of one forward pass: expert load, filled columns, routing agreement."""
    real, parts = micro.seen.real, expert_parts(model.config.num_experts)
    metrics = diagnostics.load_metrics(router.load, router.confidence, real, parts)
    if packing is not None:
        metrics["packing/fill"] = Mean(real.sum(dtype=jnp.float32), jnp.float32(real.size))
    if batch.logp_old is None:  # otherwise `score` has already measured it
        valid = micro.seen.routing.valid
        metrics |= diagnostics.routing_metrics(agreement(micro.seen, router), valid)
    return metrics


def measure(details: LossDetails, scored: HeadOutput, batch: TrainBatch) -> Metrics:
    """Computes metrics on the loss of one update.

    Args:
      details: from `Objective.total`.
      scored: log π_θ and entropy of each response token, `[B, T]`.
      batch: the mini-batch.
    """
    mask, logp = batch.response_mask, scored.logp
    metrics = {
        "loss": Mean(details.total, details.count),
        "entropy": diagnostics.masked_mean(scored.entropy, mask),
        **diagnostics.weight_metrics(details.token_loss, mask),
        **diagnostics.validity_metrics(
            logp, batch.logp_old, batch.logp_rollout, batch.advantages, mask
        ),
    }
    if details.factor is not None:
        old = logp if batch.logp_old is None else batch.logp_old
        metrics |= diagnostics.correction_metrics(details.factor, old, batch.logp_rollout, mask)
    if batch.logp_old is not None:
        metrics |= diagnostics.staleness_metrics(logp, batch.logp_old, mask)
    if details.kl is not None:
        metrics["reference/kl"] = diagnostics.masked_mean(details.kl, mask)
    return metrics
