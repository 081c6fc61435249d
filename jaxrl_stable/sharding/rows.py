"""Splitting the rows of an array into consecutive parts on a mesh.

By default, rows are split in place: part p takes its share of each device's rows, so no row moves
and every device has work in every part. With `in_order`, part p is the p-th contiguous run of rows
regardless of the mesh, so rows move between devices. On one device, both splits are the same.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrl_stable.sharding.mesh import BATCH, ROWS, mesh_in_use
from jaxrl_stable.sharding.rules import constrain


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
      in_order: whether part p is the p-th contiguous run of rows.
    """
    rows = x.shape[axis] // parts
    devices = 1 if in_order else _devices(rows, over)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    # Constrain columns first: XLA cannot do both in one step and would gather everything.
    x = constrain(x, *[None] * axis, over, *_columns(over))
    x = x.reshape(*before, devices, parts, rows // devices, *after)
    x = jnp.moveaxis(x, axis + 1, 0).reshape(parts, *before, rows, *after)
    return constrain(x, *[None] * (axis + 1), over, *_columns(over))


def join_rows(
    x: Array, axis: int = 0, *, over: tuple[str, ...] = BATCH, in_order: bool = False
) -> Array:
    """Inverse of `cut_rows`: merges the leading axis into the rows."""
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
    """Returns the number of devices that share a part's rows; 1 if they do not divide evenly."""
    mesh = mesh_in_use()
    devices = 1 if mesh.empty else math.prod(mesh.shape[a] for a in over)
    return devices if rows % devices == 0 else 1


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the rows of prompts, samples and rewards."""
    return NamedSharding(mesh, P(ROWS))


def row_parts(mesh: Mesh) -> int:
    """Returns the number of shards of rows under `row_sharding`."""
    return math.prod(mesh.shape[a] for a in ROWS)


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays on the mesh, sharded over their leading axis.

    Args:
      mesh: device mesh.
      tree: host arrays `[B, …]`; each process passes all rows.

    Raises:
      ValueError: if the rows do not divide evenly over the devices.
    """
    sharding, parts = row_sharding(mesh), row_parts(mesh)

    def place(x: Any) -> Array:
        x = np.asarray(x)
        if x.shape[0] % parts:
            raise ValueError(
                f"{x.shape[0]} rows cannot be spread evenly over {parts} devices; use a multiple "
                f"of {parts}"
            )
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)
