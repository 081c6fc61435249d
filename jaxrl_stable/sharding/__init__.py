"""Placement of arrays: the mesh, the rules for parameters, collectives, and rows of batches."""

from jaxrl_stable import _moved
from jaxrl_stable.sharding.collectives import gather_axis, gathered
from jaxrl_stable.sharding.mesh import (
    AXES,
    BATCH,
    ROWS,
    STORED,
    MeshShape,
    make_mesh,
    mesh_axes,
    mesh_in_use,
)
from jaxrl_stable.sharding.rows import cut_rows, join_rows, row_parts, row_sharding, shard_rows
from jaxrl_stable.sharding.rules import (
    PARAMETER_RULES,
    abstract_state,
    constrain,
    constrain_state,
    expert_parts,
    for_sampling,
    sharded_init,
    spec,
    state_shardings,
)

__all__ = [
    "AXES",
    "BATCH",
    "PARAMETER_RULES",
    "ROWS",
    "STORED",
    "MeshShape",
    "abstract_state",
    "constrain",
    "constrain_state",
    "cut_rows",
    "expert_parts",
    "for_sampling",
    "gather_axis",
    "gathered",
    "join_rows",
    "make_mesh",
    "mesh_axes",
    "mesh_in_use",
    "row_parts",
    "row_sharding",
    "shard_rows",
    "sharded_init",
    "spec",
    "state_shardings",
]

__getattr__ = _moved.moved_names("jaxrl_stable.sharding")  # names that have moved
