"""Where the rows and columns of activations live during one pass of the model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrl_stable.sharding.mesh import BATCH, ROWS, mesh_in_use


class Layout(NamedTuple):
    """Mesh axes of the rows and of the columns of an activation `[B, T, ...]`.

    Attributes:
      rows, columns: mesh axes; empty where the axis is whole on every device.
      shape: size of every mesh axis that is larger than one; empty on one device.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    shape: tuple[tuple[str, int], ...] = ()

    def size(self, axes: tuple[str, ...]) -> int:
        """Number of parts over these mesh axes."""
        return math.prod(dict(self.shape).get(a, 1) for a in axes)

    def spec(self, *rest: Any) -> P:
        """Partition of `[B, T, *rest]`."""
        return P(self.rows or None, self.columns or None, *rest)

    def present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the mesh axes that are larger than one."""
        return tuple(a for a in axes if a in dict(self.shape))

    def whole_columns(self, x: Array) -> Array:
        """Brings all columns of an activation `[B, T, ...]` to every device of its rows."""
        if not self.columns:
            return x
        free = [P.UNCONSTRAINED] * (x.ndim - 2)
        return jax.lax.with_sharding_constraint(x, P(self.rows or None, None, *free))

    def constrain(self, x: Array, *rest: Any) -> Array:
        """Keeps an activation `[B, T, *rest]` in this layout."""
        return jax.lax.with_sharding_constraint(x, self.spec(*rest)) if self.shape else x


ONE_DEVICE = Layout()


def layout(batch: int, columns: int, *, sampling: bool) -> Layout:
    """How activations are spread over the mesh in use (`jax.set_mesh`).

    A sampler spreads rows over all devices, since its columns come one by one. In training the
    columns are spread over `context`.

    Raises:
      ValueError: the rows or columns do not divide; every device would compute all of them.
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
