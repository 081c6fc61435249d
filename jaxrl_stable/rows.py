"""Splitting the rows of an array into consecutive parts on a mesh.

By default rows are split in place: part p takes its share of each device's rows, so no row moves
and every device has work in every part. With `in_order`, part p is the p-th contiguous run of rows
regardless of the mesh, so rows move. On one device both are the same.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_stable.sharding import BATCH, constrain, mesh_in_use


def cut_rows(
    x: Array,
    parts: int,
    axis: int = 0,
    *,
    over: tuple[str, ...] = BATCH,
    in_order: bool = False,
) -> Array:
    """Splits the rows of an array into equal parts, stacked along a new leading axis.

    Args:
      x: array with rows at `axis` and columns (if any) at the next axis.
      parts: number of parts.
      axis: index of the row axis.
      over: mesh axes over which the rows are sharded.
      in_order: make part p the p-th contiguous run of rows.
    """
    rows = x.shape[axis] // parts
    devices = 1 if in_order else _devices(rows, over)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    # Constrain columns first: XLA cannot do both at once and would gather everything.
    x = constrain(x, *[None] * axis, over, *_columns(over))
    x = x.reshape(*before, devices, parts, rows // devices, *after)
    x = jnp.moveaxis(x, axis + 1, 0).reshape(parts, *before, rows, *after)
    return constrain(x, *[None] * (axis + 1), over, *_columns(over))


def join_rows(
    x: Array, axis: int = 0, *, over: tuple[str, ...] = BATCH, in_order: bool = False
) -> Array:
    """Inverse of `cut_rows`; removes the leading axis."""
    parts, rows = x.shape[0], x.shape[axis + 1]
    devices = 1 if in_order else _devices(rows, over)
    x = jnp.moveaxis(x, 0, axis)  # [..., parts, rows, ...]
    before, after = x.shape[:axis], x.shape[axis + 2 :]
    x = jnp.moveaxis(x.reshape(*before, parts, devices, rows // devices, *after), axis, axis + 1)
    x = x.reshape(*before, parts * rows, *after)
    return constrain(x, *[None] * axis, over, *_columns(over))


def _columns(over: tuple[str, ...]) -> tuple[str, ...]:
    return () if "context" in over else ("context",)


def _devices(rows: int, over: tuple[str, ...]) -> int:
    """Returns the number of devices that share the rows of a part; 1 if not divisible."""
    mesh = mesh_in_use()
    devices = 1 if mesh.empty else math.prod(mesh.shape[a] for a in over)
    return devices if rows % devices == 0 else 1
