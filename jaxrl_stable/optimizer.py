"""Training state, optimiser, and the step that is skipped when a gradient is not finite."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_stable.configs import Optimizer
from jaxrl_stable.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update step takes and returns.

    Attributes:
      model: the policy π_θ.
      opt_state: moments, shaped and sharded like the parameters.
      step: gradient steps tried, skipped ones included.
      skipped: gradient steps skipped for a non-finite gradient.
      skipped_in_a_row: how many of them stand at the end.
    """

    model: Transformer
    opt_state: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def make_optimizer(config: Optimizer) -> optax.GradientTransformation:
    """The optax chain of a config."""
    rate, warmup = config.learning_rate, max(config.warmup_steps, 1)
    schedule = optax.linear_schedule(0.0, rate, warmup)
    if config.decay_steps:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, rate, warmup, warmup + config.decay_steps, rate / 10
        )
    # optax counts from 0 before the first update: shift by one so that it has a non-zero rate.
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: schedule(count + 1),
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=_matrices,
        ),
    )


def init_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step. Moments are float32 whatever the parameters are stored in."""
    float32 = jax.tree.map(lambda w: w.astype(jnp.float32), model)
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each can be donated
    return TrainState(model, optimizer.init(float32), *counters)


def to_parts(state: TrainState) -> dict[str, Any]:
    """The state as named parts of a checkpoint, so that a model can be restored alone."""
    counters = (state.step, state.skipped, state.skipped_in_a_row)
    return {"model": state.model, "optimizer": (state.opt_state, counters)}


def from_parts(parts: dict[str, Any]) -> TrainState:
    """Inverse of `to_parts`."""
    opt_state, counters = parts["optimizer"]
    return TrainState(parts["model"], opt_state, *counters)


def apply_gradients(
    state: TrainState, gradients: Transformer, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Float[Array, ""]]:
    """One optimiser step; weights and moments stay as they were if any gradient is not finite.

    Returns:
      The new state, and the global norm of the gradient before clipping.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    model, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (model, opt_state),
        (state.model, state.opt_state),
    )
    skipped = 1 - finite.astype(jnp.int32)
    return (
        TrainState(
            model,
            opt_state,
            state.step + 1,
            state.skipped + skipped,
            (state.skipped_in_a_row + 1) * skipped,
        ),
        norm,
    )


def _matrices(model: Transformer) -> Transformer:
    """True where weight decay applies: parameters that a product sums over."""

    def is_matrix(param: nnx.Variable) -> bool:
        return param.get_metadata()["inputs"] is not None

    return jax.tree.map(is_matrix, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
