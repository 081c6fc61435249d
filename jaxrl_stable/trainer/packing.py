"""Segment packing: several short rows of a batch share one row of model input.

Responses in a rollout vary in length, and a padded row costs as much as a full one. A packed row of
T columns holds several prompts with their responses, one after another, as segments that do not
attend to each other. Only the model sees packed rows: its outputs are moved back to the tokens'
original positions, so losses, corrections and metrics are unaffected.

Each device packs its own rows with first-fit decreasing (Johnson et al. 1974), so no data moves
between devices. Shapes are fixed: the packed batch has as many rows as the original one. Rows are
filled from the front, and micro-batches that are empty on all devices are skipped. The plan depends
only on the lengths, so `score` and `update` pack the same rows in the same way.

    packing/fill            share of the processed columns that hold a token
    packing/columns_share   processed columns as a share of the columns without packing
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable.routing import Routing
from jaxrl_stable.sharding.layout import layout
from jaxrl_stable.sharding.rows import cut_rows, join_rows
from jaxrl_stable.trainer.batch import TrainBatch, micro_batches


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Mapping between the slots of the packed rows and the slots of the batch.

    A slot is one entry of `[B, T]`. Slots are numbered row by row within one device. An index equal
    to the number of slots means "empty".

    Attributes:
      source: batch slot whose token each packed slot holds.
      target: packed slot that holds the token of each batch slot.
      used: number of leading micro-batches that hold a token on any device.
    """

    source: Int[Array, "B T"]
    target: Int[Array, "B T"]
    used: Int[Array, ""]


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Model input for a packed micro-batch; fields not listed here are as in `TrainBatch`.

    Attributes:
      positions: position of each token within its segment, from 0.
      segment_ids: segment of each token, unique within its row; 0 is padding.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    response_mask: Bool[Array, "B T"]
    routing: Routing

    @property
    def real(self) -> Bool[Array, "B T"]:
        return self.segment_ids != 0

    @property
    def prompt_width(self) -> int:
        """Always 1, since a response may start in any column except the first."""
        return 1


class Micro(NamedTuple):
    """One micro-batch.

    Attributes:
      seen: model input.
      rows: objective input. For a packed micro-batch this is the whole batch, with the response
        mask cleared outside the micro-batch. Like padding rows, the other rows then add nothing.
      cotangents: gradients of the loss with respect to the model outputs, aligned with `rows`; None
        if the loss is differentiated together with the model.
      source: this micro-batch's part of `Packing.source`; None if rows are not packed.
      target: `Packing.target` with slots numbered from the start of this micro-batch, and with
        tokens outside it marked as empty; None if rows are not packed.
    """

    seen: TrainBatch | PackedRows
    rows: TrainBatch
    cotangents: Any = None
    source: Int[Array, "b T"] | None = None
    target: Int[Array, "B T"] | None = None

    def to_rows(self, outputs: Any) -> Any:
        """Moves model outputs `[b, T]` to the slots of their tokens in `rows`; 0 elsewhere."""
        if self.target is None:
            return outputs
        return jax.tree.map(lambda x: _moved(x, self.target, self.source), outputs)


def plan(real: Bool[Array, "B T"], micro_batch_size: int) -> Packing:
    """Plans the packing of rows whose tokens are contiguous.

    Args:
      real: True on tokens, False on padding.
      micro_batch_size: number of packed rows per micro-batch.

    Raises:
      ValueError: if columns are sharded over devices, or rows do not divide evenly over them.
    """
    where = layout(micro_batch_size, real.shape[1], sampling=False)
    if where.columns:
        raise ValueError(
            "packed rows need all their columns on one device; set MeshShape.context = 1 or "
            "Reinforcement.packed = False"
        )
    rows_here = micro_batch_size // where.size(where.rows)

    def local(real: Bool[Array, "b T"]) -> Packing:
        length, width, none = real.sum(-1), real.shape[1], real.size
        row, start = first_fit_decreasing(length, width)
        shift = row * width + start - real.argmax(-1)
        target = jnp.where(real, shift[:, None] + jnp.arange(width), none)
        source = jnp.full_like(target, none).reshape(-1)
        source = source.at[target.reshape(-1)].set(jnp.arange(none), mode="drop")
        used = (jnp.where(length > 0, row + 1, 0).max() + rows_here - 1) // rows_here
        used = jax.lax.pmax(used, where.rows) if where.rows else used
        return Packing(source.reshape(real.shape), target, used)

    if not where.shape:
        return local(real)
    rows = where.spec()
    return jax.shard_map(local, in_specs=rows, out_specs=Packing(rows, rows, P()))(real)


def first_fit_decreasing(
    lengths: Int[Array, "b"], width: int
) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
    """Places each segment, longest first, in the first row with enough room.

    Args:
      lengths: columns per segment, at most `width`.
      width: columns per row; there are as many rows as segments.

    Returns:
      Row of each segment, and its first column in that row.
    """
    order = jnp.argsort(-lengths)

    def place(
        free: Int[Array, "b"], length: Int[Array, ""]
    ) -> tuple[Int[Array, "b"], tuple[Int[Array, ""], Int[Array, ""]]]:
        row = jnp.argmax(free >= length)
        return free.at[row].add(-length), (row, width - free[row])

    _, places = jax.lax.scan(place, jnp.full_like(lengths, width), lengths[order])
    return jax.tree.map(lambda x: x[jnp.argsort(order)], places)


def scan_micro_batches(
    step: Callable[[Any, Micro], tuple[Any, Any]],
    carry: Any,
    batch: TrainBatch,
    micro_batch_size: int,
    packing: Packing | None = None,
    cotangents: Any = None,
) -> tuple[Any, Any]:
    """Runs `jax.lax.scan` over the micro-batches of a batch.

    Args:
      step: maps a carry and a micro-batch to the new carry and an output.
      carry: initial carry.
      batch: rows of the batch.
      micro_batch_size: rows per micro-batch.
      packing: result of `plan`, or None if rows are not packed.
      cotangents: arrays `[B, T]` that `step` receives as `Micro.cotangents`, or None.

    Returns:
      The final carry, and the stacked outputs of `step`; these are 0 for skipped micro-batches.
    """
    parts = batch.tokens.shape[0] // micro_batch_size
    cut = partial(cut_rows, parts=parts)
    if packing is None:
        xs = micro_batches(batch, parts), jax.tree.map(cut, cotangents)
        return jax.lax.scan(lambda carry, x: step(carry, Micro(x[0], *x)), carry, xs)

    def packed(carry: Any, x: tuple[Int[Array, ""], Int[Array, "b T"]]) -> tuple[Any, Any]:
        i, source = x
        columns = _columns_here(source)
        target = packing.target - i * columns
        here = (target >= 0) & (target < columns)
        rows = dataclasses.replace(batch, response_mask=batch.response_mask & here)
        target = jnp.where(here, target, columns)
        return step(carry, Micro(pack(batch, source), rows, cotangents, source, target))

    return _scan_first(packed, carry, (jnp.arange(parts), cut(packing.source)), packing.used)


def pack(batch: TrainBatch, source: Int[Array, "b T"]) -> PackedRows:
    """Builds the model input for packed rows; `source` is as in `Micro`."""
    real = source < _columns_here(batch.tokens)
    positions = jnp.arange(source.shape[1]) - batch.real.argmax(-1)[:, None]
    return PackedRows(
        tokens=_take(batch.tokens, source),
        positions=_take(positions, source),
        segment_ids=jnp.where(real, source // source.shape[1] + 1, 0),
        response_mask=_take(batch.response_mask, source),
        routing=Routing(
            _take(batch.routing.experts, source, axis=1), _take(batch.routing.valid, source)
        ),
    )


def joined(stacked: Array, packing: Packing | None, axis: int = 0) -> Array:
    """Joins stacked outputs of `scan_micro_batches` and undoes the packing.

    `axis` is the index of B in the result.
    """
    x = join_rows(stacked, axis)
    return x if packing is None else _take(x, packing.target, axis)


def _scan_first(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, count: Int[Array, ""]
) -> tuple[Any, Any]:
    """Like `jax.lax.scan`, but steps from `count` on do nothing and output 0.

    A loop that stops at `count` would have a dynamic number of steps. A scan has a static one, so
    ahead-of-time analysis of the program gets an upper bound.
    """

    def step_or_skip(carry: Any, x: tuple[Int[Array, ""], Any]) -> tuple[Any, Any]:
        i, x = x

        def skip(carry: Any) -> tuple[Any, Any]:
            shapes = jax.eval_shape(lambda carry: step(carry, x)[1], carry)
            return carry, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

        return jax.lax.cond(i < count, lambda carry: step(carry, x), skip, carry)

    steps = jnp.arange(jax.tree.leaves(xs)[0].shape[0])
    return jax.lax.scan(step_or_skip, carry, (steps, xs))


def _columns_here(rows: Array) -> int:
    """Returns the number of slots of `[B, T]` on one device, which is also the "empty" index."""
    where = layout(*rows.shape, sampling=False)
    return rows.size // where.size(where.rows)


def _take(x: Array, index: Int[Array, "b T"], axis: int = 0) -> Array:
    """Gathers slots of `[..., B, T, ...]` on each device; `axis` is the index of B."""
    where = layout(*index.shape, sampling=False)

    def local(x: Array, index: Int[Array, "b T"]) -> Array:
        flat = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return flat.at[(slice(None),) * axis + (index,)].get(mode="fill", fill_value=0)

    if not where.shape:
        return local(x, index)
    rows = P(*[None] * axis, where.rows or None)
    return jax.shard_map(local, in_specs=(rows, where.spec()), out_specs=rows)(x, index)


@jax.custom_vjp
def _moved(
    x: Float[Array, "b T"], there: Int[Array, "B T"], back: Int[Array, "b T"]
) -> Float[Array, "B T"]:
    """Like `_take(x, there)`; no slot is taken twice, so its gradient is also a `_take`."""
    return _take(x, there)


def _moved_fwd(
    x: Float[Array, "b T"], there: Int[Array, "B T"], back: Int[Array, "b T"]
) -> tuple[Float[Array, "B T"], tuple[Int[Array, "B T"], Int[Array, "b T"]]]:
    return _take(x, there), (there, back)


def _moved_bwd(
    residuals: tuple[Int[Array, "B T"], Int[Array, "b T"]], g: Float[Array, "B T"]
) -> tuple[Float[Array, "b T"], np.ndarray, np.ndarray]:
    there, back = residuals
    return _take(g, back), *(np.zeros(x.shape, jax.dtypes.float0) for x in residuals)


_moved.defvjp(_moved_fwd, _moved_bwd)
