"""Rows of a batch: which processes hold them, which one owns each, and how they are exchanged."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Int

from jaxrl_stable.distributed.processes import several


def holders(sharding: Sharding, rows: int) -> list[list[int]]:
    """Returns, for each row of an array with this sharding, the processes whose devices hold it."""
    found: list[set[int]] = [set() for _ in range(rows)]
    for device, index in sharding.devices_indices_map((rows,)).items():
        for row in range(*index[0].indices(rows)):
            found[row].add(device.process_index)
    return [sorted(processes) for processes in found]


def held_rows(sharding: Sharding, rows: int) -> Bool[np.ndarray, "B"]:
    """Returns a mask of the rows that devices of this process hold."""
    return np.array([jax.process_index() in processes for processes in holders(sharding, rows)])


def row_owners(sharding: Sharding, rows: int) -> Int[np.ndarray, "B"]:
    """Returns the owner of each row, chosen in turn from the processes that hold it."""
    return np.array([p[row % len(p)] for row, p in enumerate(holders(sharding, rows))], int)


def on_host(x: Array) -> np.ndarray:
    """Copies an array to the host; rows held only by other processes are zero."""
    if x.is_fully_addressable:
        return np.asarray(x)
    out = np.zeros(x.shape, x.dtype)
    for shard in x.addressable_shards:
        out[shard.index] = shard.data
    return out


def gather_rows(tree: Any, owners: Int[np.ndarray, "B"]) -> Any:
    """Exchanges host arrays `[B, …]`, taking each row from its owner."""
    if not several():
        return tree
    every = multihost_utils.process_allgather(tree)
    return jax.tree.map(lambda x: x[owners, np.arange(len(owners))], every)
