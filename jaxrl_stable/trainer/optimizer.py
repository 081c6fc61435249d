"""Training state, optimiser, and the step that is skipped when a gradient is not finite.

Whatever the parameters are stored in, the optimiser sees float32: an update at a learning rate of
1e-6 is smaller than the spacing of bfloat16, and would be lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_stable.configs import Optimizer
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.sharding import constrain_state


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
        # For a rate of 1, as optax wants a number: a study maps runs over their rates.
        whole = warmup + config.decay_steps
        share = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, whole, 0.1)
        schedule = lambda count: rate * share(count)  # noqa: E731
    # optax counts from 0 before the first update: shift by one so that it has a non-zero rate.
    return in_float32(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(
                lambda count: schedule(count + 1),
                config.b1,
                config.b2,
                config.eps,
                mu_dtype=config.first_moment_dtype,
                weight_decay=config.weight_decay,
                mask=_matrices,
            ),
        ),
        config.master_weights,
    )


class Float32State(NamedTuple):
    """State of `in_float32`.

    Attributes:
      inner: of the wrapped transformation.
      master: the parameters in float32; None where they are stored so, or no copy is kept.
    """

    inner: optax.OptState
    master: optax.Params | None


def in_float32(
    inner: optax.GradientTransformation, master_weights: bool
) -> optax.GradientTransformation:
    """Runs a transformation on float32 weights, for parameters stored in any type.

    Args:
      inner: the transformation.
      master_weights: keep the float32 weights, where parameters are stored in less. Without them
        the stored ones are taken for exact, and updates below their spacing are lost.
    """

    def init(params: optax.Params) -> Float32State:
        exact = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        narrow = any(w.dtype != jnp.float32 for w in jax.tree.leaves(params))
        return Float32State(inner.init(exact), exact if narrow and master_weights else None)

    def update(gradients, state, params):
        exact = state.master
        if exact is None:
            exact = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        updates, inner_state = inner.update(gradients, state.inner, exact)
        if state.master is None:
            return updates, Float32State(inner_state, None)
        master = optax.apply_updates(exact, updates)
        # What takes the stored weight to the rounded new one.
        moves = jax.tree.map(
            lambda new, old: new.astype(old.dtype).astype(jnp.float32) - old.astype(jnp.float32),
            master,
            params,
        )
        return moves, Float32State(inner_state, master)

    return optax.GradientTransformation(init, update)


def init_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each can be donated
    return TrainState(model, optimizer.init(model), *counters)


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
            constrain_state(model),
            constrain_state(opt_state),
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
