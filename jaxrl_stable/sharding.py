"""Mesh and axis rules: where each logical axis of a parameter, and each row of a batch, lives.

Everything else follows: shardings of moments, checkpoint templates and abstract shapes all derive
from the `axes` that a parameter declares; what the model computes in `jax.shard_map` (embedding,
attention kernels, experts, head) derives its collectives from the same rules.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH = ("data", "fsdp", "expert")  # rows of what has its columns spread over "context"
ROWS = (*BATCH, "context")  # rows of everything else: prompts, samples, rewards
STORED = ("fsdp", "expert", "context")  # a weight is cut over these for storage alone

# Logical axis of a parameter -> mesh axes; what is not listed stays whole. A mesh axis serves one
# axis of a parameter, the first that names it: experts are spread over "expert", so that what is
# left of STORED cuts their rows.
PARAMETER_RULES: dict[str, tuple[str, ...]] = {
    "embed": STORED,
    "latent_in": STORED,
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "spread_expert": ("fsdp", "expert"),  # of the sampler: see `spread`
}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; `data` takes what the others leave when it is -1.

    Attributes:
      data: copies of all weights; the only axis that may cross the network between slices.
      fsdp: weights, moments and gradients are cut over it, and gathered layer by layer.
      expert: experts are spread over it, and tokens travel to them.
      tensor: heads, widths of feed-forward layers, and the vocabulary.
      context: columns of long rows in training; while sampling it takes rows.

    Rows of a batch are spread over data, fsdp and expert together.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(shape: MeshShape, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh; the axis `data` runs over slices first, then within each.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or a slice would be cut by
        another axis than `data`.
    """
    devices = list(devices or jax.devices())
    sizes = [getattr(shape, name) for name in AXES]
    rest = math.prod(sizes[1:])
    if sizes[0] == -1:
        sizes[0] = len(devices) // rest
    wanted = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"MeshShape({wanted}) does not fit {len(devices)} devices; make the product equal"
        )
    options = dict(devices=devices, allow_split_physical_axes=True)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        array = mesh_utils.create_device_mesh(sizes, **options)
    elif sizes[0] % slices:
        raise ValueError(
            f"MeshShape({wanted}) has {slices} slices; only data crosses the network between "
            f"them, make it a multiple of {slices}"
        )
    else:
        within = [sizes[0] // slices, *sizes[1:]]
        across = [slices, *[1] * (len(sizes) - 1)]
        array = mesh_utils.create_hybrid_device_mesh(within, across, **options)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Any) -> P:
    """Partition of one parameter. An axis that its mesh axes do not divide stays whole.

    Vectors stay whole too: they are small, and to gather each would cost more than it saves.
    Several mesh axes never cut a weight over all devices but for `data`, as the last one is then
    left out: over a whole slice libtpu makes an all-reduce of a reduce-scatter, and on a 3D torus
    of an all-gather too, for twice the bytes.
    """
    vector = sum(name != "layers" for name in names) == 1
    rest = math.prod(n for a, n in mesh.shape.items() if a != "data")
    entries, taken = [], set()
    for name, size in zip(names, shape, strict=True):
        axes = () if vector else PARAMETER_RULES.get(name, ())
        axes = tuple(a for a in axes if a not in taken and mesh.shape.get(a, 1) > 1)
        for_storage = PARAMETER_RULES.get(name) is STORED
        if for_storage and len(axes) > 1 and math.prod(mesh.shape[a] for a in axes) == rest:
            axes = axes[:-1]
        axes = _fitting(axes, size, mesh)
        taken.update(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return P(*entries)


def _fitting(axes: tuple[str, ...], size: int, mesh: Any) -> tuple[str, ...]:
    """Those of the axes that together cut an axis of this size into the most equal parts."""
    parts = lambda some: math.prod(mesh.shape[a] for a in some)  # noqa: E731
    some = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    return max((c for c in some if size % parts(c) == 0), key=parts)


def mesh_in_use() -> Any:
    """The mesh of `jax.set_mesh`; empty where there is none, or nothing to spread over.

    Inside a `jax.shard_map` over axes of one's own, such as the runs of a study, every device is on
    its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    foreign = set(mesh.axis_names) - set(AXES)
    alone = foreign and set(mesh.axis_names) <= set(mesh.manual_axes)
    return jax.sharding.AbstractMesh((), ()) if alone else mesh


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of any tree that holds parameters or things shaped like them (moments).

    Args:
      mesh: the mesh.
      state: arrays or abstract shapes; parameters are `nnx.Param` with `axes`.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        names = leaf.get_metadata()["axes"]
        value = leaf.get_value()
        return leaf.replace(
            jax.tree.map(lambda x: NamedSharding(mesh, spec(names, x.shape, mesh)), value)
        )

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def abstract_state(mesh: Mesh, init: Callable[[], Any]) -> Any:
    """Shapes, types and shardings of what `init` makes, without making it."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def sharded_init(mesh: Mesh, init: Callable[[], Any]) -> Any:
    """Makes a state in place: every device makes its own part."""
    return jax.jit(init, out_shardings=state_shardings(mesh, jax.eval_shape(init)))()


def spread(model: Any) -> Any:
    """The same weights, named so that a sampler finds them in place.

    A decode step has few tokens and reads every weight: to gather weights for each would cost more
    than the step. So the experts are spread over all of `fsdp` and `expert`, and what is not an
    expert is whole on every device (but for `tensor`).
    """
    new_names = {"expert": "spread_expert", "embed": "whole_embed", "latent_in": "whole_latent"}

    def rename(param: nnx.Variable) -> nnx.Variable:
        metadata = param.get_metadata()
        named = {
            field: metadata[field] and tuple(new_names.get(n, n) for n in metadata[field])
            for field in ("axes", "inputs")
        }
        return param.replace(param.get_value(), **named)

    return jax.tree.map(rename, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gathered(w: Array, names: tuple[str, ...]) -> Array:
    """Brings a weight together from the devices that store parts of it; its gradient goes back.

    Said of both directions, as the gradient is then summed where it is kept (a reduce-scatter),
    never as a whole on every device. It travels in the type that `w` has here, the compute type, so
    in half precision the sum over devices is rounded on its way. Nothing without a mesh.

    Args:
      w: the weight, or one layer of a stacked one.
      names: its logical axes; a leading `layers` that a scan has taken off does not count.
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
    """Inside `jax.shard_map`: brings together an axis that is cut over mesh axes.

    Its gradient is a reduce-scatter. libtpu has one only along the major axis of the memory layout
    (else it makes an all-reduce and a slice, for twice the bytes), so the parts lead there, with
    the axes between merged to keep the layout from changing places with them.
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


def constrain(x: Array, *entries: Any) -> Array:
    """Keeps the axes of an array spread over mesh axes, inside a jitted function.

    An axis that its mesh axes do not divide stays whole. Nothing without a mesh.

    Args:
      x: the array.
      entries: mesh axes of its first axes, None for a whole one.
    """
    mesh = mesh_in_use()
    if mesh.empty or mesh.size == 1:
        return x
    fits = [
        entry if size % math.prod(mesh.shape[a] for a in mesh_axes(entry)) == 0 else None
        for size, entry in zip(x.shape, entries)
    ]
    return jax.lax.with_sharding_constraint(x, P(*fits))


def expert_parts(num_experts: int) -> int:
    """Number of devices that the experts of a layer are spread over, on the mesh in use."""
    mesh = mesh_in_use()
    parts = 1 if mesh.empty else mesh.shape["expert"]
    return parts if num_experts and num_experts % parts == 0 else 1


def constrain_state(state: Any) -> Any:
    """Keeps parameters where their axes say, inside a jitted function."""
    mesh = mesh_in_use()
    if mesh.empty or mesh.size == 1:
        return state

    def of(param: Any) -> Any:
        if not isinstance(param, nnx.Variable):
            return param
        names = param.get_metadata()["axes"]
        return param.replace(
            jax.tree.map(
                lambda x: jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh)),
                param.get_value(),
            )
        )

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of prompts, samples and rewards lie."""
    return NamedSharding(mesh, P(ROWS))


def row_parts(mesh: Mesh) -> int:
    """Into how many equal parts those rows are cut."""
    return math.prod(mesh.shape[a] for a in ROWS)


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays whose leading axis is the batch; every process passes all rows.

    Raises:
      ValueError: the rows do not divide over the devices.
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
