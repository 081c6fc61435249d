"""All-gathers whose gradient is a reduce-scatter, for weights and inside `jax.shard_map`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrl_stable.sharding.mesh import STORED, mesh_axes, mesh_in_use
from jaxrl_stable.sharding.rules import spec


def gathered(w: Array, names: tuple[str, ...]) -> Array:
    """Gathers a weight from the devices that store its shards; does nothing without a mesh.

    Both directions are constrained: the gradient is reduce-scattered to where the weight is stored
    and is never materialised as a whole. It is sent in the dtype of `w`, which is the compute
    dtype, so in half precision the partial sums over devices are rounded.

    Args:
      w: the weight, or one layer of a stacked one.
      names: its logical axes; if a scan has consumed a leading `layers` axis, that one is ignored.

    Returns:
      The weight, replicated over the storage axes.
    """
    mesh = mesh_in_use()
    if mesh.empty or mesh.size == 1:
        return w
    stored = spec(names[-w.ndim :], w.shape, mesh)
    whole = P(*(_without(entry, STORED) for entry in stored))
    return w if whole == stored else _gathered(w, stored, whole)


def _without(entry: Any, axes: tuple[str, ...]) -> Any:
    rest = tuple(a for a in mesh_axes(entry) if a not in axes)
    return rest if len(rest) > 1 else rest[0] if rest else None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w: Array, stored: P, whole: P) -> Array:
    return jax.lax.with_sharding_constraint(w, whole)


_gathered.defvjp(
    lambda w, stored, whole: (jax.lax.with_sharding_constraint(w, whole), None),
    lambda stored, whole, _, g: (jax.lax.with_sharding_constraint(g, stored),),
)


def gather_axis(x: Array, axes: tuple[str, ...], axis: int) -> Array:
    """All-gathers an axis that is sharded over mesh axes, inside `jax.shard_map`.

    The gradient is a reduce-scatter. libtpu implements it only along the major axis of the memory
    layout; otherwise it emits an all-reduce and a slice, which send twice the bytes. So the shards
    become the leading axis, and the axes in between are merged to keep the compiler from reordering
    them.
    """
    return _gather_axis(x, axes, axis) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_axis(x: Array, axes: tuple[str, ...], axis: int) -> Array:
    parts = jnp.moveaxis(jax.lax.all_gather(x, axes), 0, axis)
    return parts.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _scatter_axis(axes: tuple[str, ...], axis: int, _: None, g: Array) -> tuple[Array]:
    size = jax.lax.axis_size(axes)
    shape = (*g.shape[:axis], g.shape[axis] // size, *g.shape[axis + 1 :])
    parts = jnp.moveaxis(g.reshape(*g.shape[:axis], size, *shape[axis:]), axis, 0)
    merged = parts.reshape(size, -1, g.shape[-1] if axis < g.ndim - 1 else shape[-1])
    return (jax.lax.psum_scatter(merged, axes, scatter_dimension=0).reshape(shape),)


_gather_axis.defvjp(lambda x, axes, axis: (_gather_axis(x, axes, axis), None), _scatter_axis)
