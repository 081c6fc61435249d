"""The device mesh: its axes, how to make it, and the mesh on which a traced function runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxrl_stable.checks import field_types, positive

AXES = ("data", "fsdp", "expert", "tensor", "context")


BATCH = ("data", "fsdp", "expert")  # axes that shard rows, if columns are sharded over "context"


ROWS = (*BATCH, "context")  # axes that shard rows of all other arrays: prompts, samples, rewards


STORED = ("fsdp", "expert", "context")  # axes that shard weights, but only for storage


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis. Rows of a batch are sharded over data, fsdp, expert.

    Attributes:
      data: replicas of all weights; the only axis that may cross the network between slices. -1
        uses all devices that the other axes leave over.
      fsdp: shards of weights, moments and gradients, gathered layer by layer.
      expert: shards of the experts, to which tokens are sent.
      tensor: shards of heads, feed-forward widths and the vocabulary.
      context: shards of the columns of long rows in training; used for rows in sampling.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        field_types(self)
        positive(self, *(name for name in AXES if name != "data"))
        if self.data != -1 and self.data < 1:
            raise ValueError(f"MeshShape.data is {self.data}; use at least 1, or -1 for the rest")


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the device mesh; `data` runs over slices first, then within each slice.

    Args:
      shape: sizes of the axes.
      devices: devices of the mesh; all of them by default.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or if an axis other than
        `data` would cross slices.
    """
    devices = list(devices or jax.devices())
    sizes = [getattr(shape, name) for name in AXES]
    rest = math.prod(sizes[1:])
    if sizes[0] == -1:
        sizes[0] = len(devices) // rest
    wanted = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"MeshShape({wanted}) does not fit {len(devices)} devices; the sizes must multiply to "
            "that number"
        )
    options = dict(devices=devices, allow_split_physical_axes=True)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        array = mesh_utils.create_device_mesh(sizes, **options)
    elif sizes[0] % slices:
        raise ValueError(
            f"MeshShape({wanted}) spans {slices} slices; only data may cross the network "
            f"between them, so make data a multiple of {slices}"
        )
    else:
        within = [sizes[0] // slices, *sizes[1:]]
        across = [slices, *[1] * (len(sizes) - 1)]
        array = mesh_utils.create_hybrid_device_mesh(within, across, **options)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_in_use() -> Any:
    """Returns the mesh set with `jax.set_mesh`, or an empty one.

    Inside a `jax.shard_map` over other axes, such as the runs of a study, the mesh counts as empty
    because each device then works independently.
    """
    mesh = jax.sharding.get_abstract_mesh()
    foreign = set(mesh.axis_names) - set(AXES)
    alone = foreign and set(mesh.axis_names) <= set(mesh.manual_axes)
    return jax.sharding.AbstractMesh((), ()) if alone else mesh


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
