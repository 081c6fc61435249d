"""Training state, optimiser, and an update step that skips non-finite gradients.

A gradient of exactly 0 is not skipped by default: see `Optimizer.skip_zero_gradients`.

The optimiser works in float32 regardless of the parameters' storage dtype: an update at a learning
rate of 1e-6 is smaller than the spacing of bfloat16 values and would be lost.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable.configs import Optimizer
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.sharding import constrain_state


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Training state: input and output of an update step.

    Attributes:
      model: the policy π_θ.
      opt_state: optimiser moments, shaped and sharded like the parameters.
      step: number of gradient steps attempted, including skipped ones.
      skipped: number of steps skipped because of a non-finite gradient.
      skipped_in_a_row: length of the current streak of skipped steps.
    """

    model: Transformer
    opt_state: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def make_schedule(config: Optimizer) -> optax.Schedule:
    """Returns the learning rate as a function of the number of the update; the first is 1."""
    rate, warmup = config.learning_rate, max(config.warmup_steps, 1)
    schedule = optax.linear_schedule(0.0, rate, warmup)
    if config.decay_steps:
        # Built for rate 1.0 and scaled: optax needs a Python number, but a study vmaps over rates.
        whole = warmup + config.decay_steps
        share = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, whole, 0.1)
        schedule = lambda count: rate * share(count)  # noqa: E731
    return schedule


def make_optimizer(config: Optimizer) -> optax.GradientTransformation:
    """Builds the optax chain of a config."""
    schedule = make_schedule(config)
    # optax counts from 0; the shift by one gives the first update a non-zero rate.
    optimizer = in_float32(
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
    return skip_zero_gradients(optimizer) if config.skip_zero_gradients else optimizer


def skip_zero_gradients(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps a transformation so that a gradient of exactly 0 changes neither weights nor state.

    The wrapper adds no state, so checkpoints are compatible with and without it.
    """

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new_state = inner.update(gradients, state, params)
        zero = all_zero(gradients)
        updates = jax.tree.map(lambda x: jnp.where(zero, 0.0, x).astype(x.dtype), updates)
        return updates, jax.tree.map(lambda new, old: jnp.where(zero, old, new), new_state, state)

    return optax.GradientTransformation(inner.init, update)


def all_zero(gradients: optax.Updates) -> Bool[Array, ""]:
    """Returns True if every entry is 0. (The norm could also be 0 if the squares underflow.)"""
    return ~jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients)]).any()


def learning_rate(state: TrainState, config: Optimizer) -> Float[Array, ""]:
    """Returns the learning rate of the last update that was not skipped; 0 before the first."""

    def is_schedule(node: object) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = filter(is_schedule, jax.tree.leaves(state.opt_state, is_leaf=is_schedule))
    return make_schedule(config)(next(nodes).count)


class Float32State(NamedTuple):
    """State of `in_float32`.

    Attributes:
      inner: state of the wrapped transformation.
      master: float32 copy of the parameters; None if they are float32 or no copy is kept.
    """

    inner: optax.OptState
    master: optax.Params | None


def in_float32(
    inner: optax.GradientTransformation, master_weights: bool
) -> optax.GradientTransformation:
    """Runs a transformation on float32 weights, for parameters stored in any dtype.

    Args:
      inner: the transformation.
      master_weights: whether to keep a float32 copy of parameters that are stored in a narrower
        dtype. Without it, the stored values are taken as exact, and updates smaller than their
        spacing are lost.
    """

    def init(params: optax.Params) -> Float32State:
        exact = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        narrow = any(w.dtype != jnp.float32 for w in jax.tree.leaves(params))
        return Float32State(inner.init(exact), exact if narrow and master_weights else None)

    def update(
        gradients: optax.Updates, state: Float32State, params: optax.Params
    ) -> tuple[optax.Updates, Float32State]:
        exact = state.master
        if exact is None:
            exact = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        updates, inner_state = inner.update(gradients, state.inner, exact)
        if state.master is None:
            return updates, Float32State(inner_state, None)
        master = optax.apply_updates(exact, updates)
        # Difference between the rounded new weight and the stored one.
        moves = jax.tree.map(
            lambda new, old: new.astype(old.dtype).astype(jnp.float32) - old.astype(jnp.float32),
            master,
            params,
        )
        return moves, Float32State(inner_state, master)

    return optax.GradientTransformation(init, update)


def init_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))  # separate buffers, each donatable
    return TrainState(model, optimizer.init(model), *counters)


def to_parts(state: TrainState) -> dict[str, Any]:
    """Splits the state into named checkpoint parts, so the model can be restored alone."""
    counters = (state.step, state.skipped, state.skipped_in_a_row)
    return {"model": state.model, "optimizer": (state.opt_state, counters)}


def from_parts(parts: dict[str, Any]) -> TrainState:
    """Inverse of `to_parts`."""
    opt_state, counters = parts["optimizer"]
    return TrainState(parts["model"], opt_state, *counters)


def apply_gradients(
    state: TrainState, gradients: Transformer, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Float[Array, ""]]:
    """Takes one optimiser step; leaves weights and moments unchanged if a gradient is non-finite.

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
    """Marks the parameters that get weight decay: matrices, but not vectors."""

    def is_matrix(param: nnx.Variable) -> bool:
        return param.get_metadata()["inputs"] is not None

    return jax.tree.map(is_matrix, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
