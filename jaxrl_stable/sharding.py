"""Mesh and axis rules: where each logical axis of a parameter lives.

Everything else follows: shardings of moments, checkpoint templates and abstract shapes all derive
from the `axes` that a parameter declares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrl_stable.configs import MeshShape

AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis of a parameter -> mesh axis. Axes that are not listed are replicated.
PARAMETER_RULES = {
    "embed": "fsdp",
    "latent_in": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
}
BATCH = ("data", "fsdp")


def make_mesh(shape: MeshShape, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = devices or jax.devices()
    sizes = [shape.data, shape.fsdp, shape.expert, shape.tensor]
    rest = int(np.prod(sizes[1:]))
    if sizes[0] == -1:
        sizes[0] = len(devices) // rest
    if np.prod(sizes) != len(devices):
        wanted = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"MeshShape({wanted}) does not fit {len(devices)} devices; make the product equal"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Partition of one parameter. An axis that its mesh axis does not divide stays whole."""
    entries = []
    for name, size in zip(names, shape, strict=True):
        axis = PARAMETER_RULES.get(name)
        entries.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return P(*entries)


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
        return leaf.replace(NamedSharding(mesh, spec(names, leaf.get_value().shape, mesh)))

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


def constrain_rows(x: Array, axis: int) -> Array:
    """Keeps the batch axis of an array spread over the devices; nothing without a mesh.

    Cutting rows into parts would otherwise spread the parts: every device would then compute every
    part in full.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[axis] % np.prod([mesh.shape[name] for name in BATCH]):
        return x
    return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, BATCH))


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays whose leading axis is the batch."""
    return jax.device_put(tree, NamedSharding(mesh, P(BATCH)))
