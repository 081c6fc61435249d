"""The processes of a run: how they find each other, which rows each has, and how they agree.

All processes run the same program in step, and each has the rows that its devices hold. Whatever
decides what comes next (rewards, lengths, a request to stop) is exchanged, so that all decide the
same. A run on one machine is the case of one process: nothing here then costs or waits.
"""

from __future__ import annotations

import os
import pathlib
import time
import uuid
import zlib
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Int

# What `launch/local.py` sets; where one is missing jax asks the cluster (TPU, Slurm, Open MPI).
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # of a launcher that jax knows

# Seconds without a heartbeat after which jax's own service ends all processes, without a readable
# line. As beats come every half of it, that is 30 to 60 after a death: `watch` is sooner.
SERVICE_DEAD = 60
BARRIER = 3600  # seconds that processes wait for each other on the host


def initialize() -> None:
    """Joins the processes of a run; must come before anything that asks for a device.

    On Cloud TPU, and under Slurm or Open MPI, jax finds the others by itself. Elsewhere the three
    variables above say where process 0 listens ("host:port"), how many processes there are, and
    which one this is. Without either there is one process, and nothing happens.

    Raises:
      ValueError: some of the variables are missing or no numbers.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
    arguments: dict[str, Any] = {}
    if COUNT in given or INDEX in given:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
        if missing or not (given[COUNT] + given[INDEX]).isdecimal():
            raise ValueError(
                f"the environment has {given}; processes need all of {ADDRESS} (host:port of "
                f"process 0), {COUNT} and {INDEX} (from 0)"
            )
        if given[COUNT] == "1":
            return
        arguments = dict(
            coordinator_address=given[ADDRESS],
            num_processes=int(given[COUNT]),
            process_id=int(given[INDEX]),
            cluster_detection_method="deactivate",
        )
    elif not _of_a_cluster():
        return
    # A stop by SIGTERM is agreed on between two steps (`preemption`): jax's own service would
    # swallow the signal at any other time.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=SERVICE_DEAD, **arguments)
    except ValueError:
        if arguments or ADDRESS in given:
            raise
        # A TPU without a cluster around it.


def _of_a_cluster() -> bool:
    """Whether jax can be expected to find several processes. It prefers a TPU where it sees one."""
    tasks = max(int(os.environ.get(name, 1)) for name in TASKS)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES")  # GKE names them; a TPU VM asks its metadata
    one_host = hosts is not None and "," not in hosts and "MEGASCALE_NUM_SLICES" not in os.environ
    return tasks > 1 or ("tpu" in (jax.config.jax_platforms or "") and not one_host)


def is_main() -> bool:
    """Whether this process writes logs and reports."""
    return global_state.process_id == 0


def several() -> bool:
    """Whether there are other processes."""
    return global_state.num_processes > 1


# --- rows ---------------------------------------------------------------------------------------


def holders(sharding: Sharding, rows: int) -> list[list[int]]:
    """For each row of an array with this sharding, the processes whose devices hold it."""
    found: list[set[int]] = [set() for _ in range(rows)]
    for device, index in sharding.devices_indices_map((rows,)).items():
        for row in range(*index[0].indices(rows)):
            found[row].add(device.process_index)
    return [sorted(processes) for processes in found]


def held_rows(sharding: Sharding, rows: int) -> Bool[np.ndarray, "B"]:
    """Rows that devices of this process hold."""
    return np.array([jax.process_index() in processes for processes in holders(sharding, rows)])


def row_owners(sharding: Sharding, rows: int) -> Int[np.ndarray, "B"]:
    """One process for each row, of those that hold it; they take turns."""
    return np.array([p[row % len(p)] for row, p in enumerate(holders(sharding, rows))], int)


def on_host(x: Array) -> np.ndarray:
    """An array on the host; rows that other processes hold are zero."""
    if x.is_fully_addressable:
        return np.asarray(x)
    out = np.zeros(x.shape, x.dtype)
    for shard in x.addressable_shards:
        out[shard.index] = shard.data
    return out


# --- agreement: every process calls these in the same order ---------------------------------------


def gather_rows(tree: Any, owners: Int[np.ndarray, "B"]) -> Any:
    """Host arrays `[B, …]` in which each row is as its owner has it."""
    if not several():
        return tree
    every = multihost_utils.process_allgather(tree)
    return jax.tree.map(lambda x: x[owners, np.arange(len(owners))], every)


def replicated(tree: Any) -> Any:
    """Global arrays, whole, on the host of every process."""
    if not several():
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def any_process(flags: Any) -> np.ndarray:
    """Elementwise: whether a flag is set in any process."""
    if not several():
        return np.asarray(flags, bool)
    return multihost_utils.process_allgather(np.asarray(flags, bool)).any(0)


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here; `name` is used once a program."""
    if several():
        global_state.client.wait_at_barrier(f"jaxrl_stable/{name}", 1000 * BARRIER)


def check_same(what: str, text: str) -> None:
    """Checks that all processes have the same; with different ones they would part without a word.

    Raises:
      ValueError: names a process that has another.
    """
    if not several():
        return
    every = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    others = np.flatnonzero(every != every[0]).tolist()
    if others:
        raise ValueError(
            f"processes {others} have another {what} than process 0; give all hosts the same "
            "files, and the same command"
        )


def check_shared(directory: str | os.PathLike) -> None:
    """Checks that all processes see the same directory; makes it.

    Raises:
      ValueError: some do not, as each host has its own.
    """
    if not several():
        return
    directory = pathlib.Path(directory)
    token = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    marker = directory / f".shared.{bytes(token).hex()}"
    if is_main():
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
    wait_for_all("marker written")
    deadline = time.monotonic() + 10  # network file systems show a new file late
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = np.zeros(global_state.num_processes, bool)
    blind[global_state.process_id] = not seen
    blind = np.flatnonzero(any_process(blind)).tolist()
    if is_main():
        marker.unlink()
    if blind:
        raise ValueError(
            f"processes {blind} do not see what process 0 writes in {directory}; give a --workdir "
            "on a file system that all hosts share"
        )
