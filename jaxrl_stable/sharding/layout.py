"""Placement of an activation's rows and columns on the mesh during one forward pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrl_stable.sharding.mesh import BATCH, ROWS, mesh_in_use


class Layout(NamedTuple):
    """Mesh axes over which the rows and columns of an activation `[B, T, ...]` are sharded.

    Attributes:
      rows, columns: mesh axes; empty if every device holds all rows (or columns).
      shape: name and size of each mesh axis with more than one device; empty on one device.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    shape: tuple[tuple[str, int], ...] = ()

    def size(self, axes: tuple[str, ...]) -> int:
        """Returns the number of shards over `axes`."""
        return math.prod(dict(self.shape).get(a, 1) for a in axes)

    def spec(self, *rest: Any) -> P:
        """Returns the PartitionSpec of an activation `[B, T, *rest]`."""
        return P(self.rows or None, self.columns or None, *rest)

    def present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the subset of `axes` with more than one device."""
        return tuple(a for a in axes if a in dict(self.shape))

    def whole_columns(self, x: Array) -> Array:
        """Gathers all columns of an activation `[B, T, ...]`; rows stay sharded."""
        if not self.columns:
            return x
        free = [P.UNCONSTRAINED] * (x.ndim - 2)
        return jax.lax.with_sharding_constraint(x, P(self.rows or None, None, *free))

    def constrain(self, x: Array, *rest: Any) -> Array:
        """Constrains an activation `[B, T, *rest]` to this layout."""
        return jax.lax.with_sharding_constraint(x, self.spec(*rest)) if self.shape else x


ONE_DEVICE = Layout()


def layout(batch: int, columns: int, *, sampling: bool) -> Layout:
    """Returns the layout of activations on the mesh in use (`jax.set_mesh`).

    A sampler shards rows over all devices, since it produces columns one by one. Training shards
    columns over `context`.

    Args:
      batch: number of rows.
      columns: number of columns.
      sampling: whether the pass belongs to a sampler.

    Raises:
      ValueError: if rows or columns do not divide evenly. Otherwise every device would silently
        compute all of them.
    """
    mesh = mesh_in_use()
    shape = () if mesh.empty else tuple((a, n) for a, n in mesh.shape.items() if n > 1)
    present = dict(shape)
    rows = tuple(a for a in (ROWS if sampling else BATCH) if a in present)
    spread_over = () if sampling else tuple(a for a in ("context",) if a in present)
    for name, size, axes in (("rows", batch, rows), ("columns", columns, spread_over)):
        parts = math.prod(present[a] for a in axes)
        if size % parts:
            raise ValueError(
                f"{size} {name} cannot be spread evenly over {parts} devices "
                f"({', '.join(f'{a}={present[a]}' for a in axes)}); use a multiple of {parts}"
            )
    return Layout(rows, spread_over, shape)
