"""Processes of a run: how they find each other and agree.

All processes run the same program in lockstep. They exchange everything that determines the next
step (rewards, lengths, a request to stop), so all of them make the same decisions. With a single
process, these functions cost nothing and never wait.
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

# Set by `launch/local.py`; if they are missing, JAX asks the cluster (TPU, Slurm, Open MPI).
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # process counts of known launchers

# Seconds without a heartbeat after which JAX's own service ends all processes, without a readable
# message. Heartbeats come twice per period, so it acts 30 to 60 s after a death; `watch` is faster.
SERVICE_DEAD = 60
BARRIER = 3600  # maximum time that processes wait for each other on the host, in seconds


def initialize() -> None:
    """Connects the processes of a run. Must be called before any code uses a device.

    On Cloud TPU, and under Slurm or Open MPI, JAX finds the other processes. Elsewhere, three
    environment variables give the address of process 0 ("host:port", ADDRESS), the number of
    processes (COUNT) and the index of this process (INDEX). Without a cluster and without these
    variables, the function does nothing.

    Raises:
      ValueError: if only some of the variables are set, or COUNT or INDEX is not a number.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
    arguments: dict[str, Any] = {}
    if COUNT in given or INDEX in given:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
        if missing or not (given[COUNT] + given[INDEX]).isdecimal():
            raise ValueError(
                f"the environment has {given}; set all of {ADDRESS} (host:port of process 0), "
                f"{COUNT} and {INDEX} (numbered from 0)"
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
    # The processes agree between two steps whether SIGTERM asked for a stop (see `preemption`);
    # JAX's own service would swallow the signal.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=SERVICE_DEAD, **arguments)
    except ValueError:
        if arguments or ADDRESS in given:
            raise
        # Otherwise this is a TPU outside a cluster, with a single process.


def _of_a_cluster() -> bool:
    """Returns whether JAX can be expected to find several processes. TPUs take precedence."""
    tasks = max(int(os.environ.get(name, 1)) for name in TASKS)
    # Set on GKE; on a TPU VM, JAX asks the metadata server instead.
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES")
    one_host = hosts is not None and "," not in hosts and "MEGASCALE_NUM_SLICES" not in os.environ
    return tasks > 1 or ("tpu" in (jax.config.jax_platforms or "") and not one_host)


def is_main() -> bool:
    """Returns whether this process writes logs and reports."""
    return global_state.process_id == 0


def several() -> bool:
    """Returns whether there are other processes."""
    return global_state.num_processes > 1


# --- Agreement: every process must call these, in the same order. -------------------------------


def replicated(tree: Any) -> Any:
    """Copies global arrays in full to the host of every process."""
    if not several():
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def any_process(flags: Any) -> np.ndarray:
    """Returns, elementwise, whether a flag is set in any process."""
    if not several():
        return np.asarray(flags, bool)
    return multihost_utils.process_allgather(np.asarray(flags, bool)).any(0)


def wait_for_all(name: str) -> None:
    """Waits until all processes have called this; each `name` can be used once per program."""
    if several():
        global_state.client.wait_at_barrier(f"jaxrl_stable/{name}", 1000 * BARRIER)


def check_same(what: str, text: str) -> None:
    """Checks that `text` is identical in all processes; otherwise they would diverge silently.

    Args:
      what: name of the text, for the error.
      text: compared by checksum.

    Raises:
      ValueError: if the text differs; the error names the processes.
    """
    if not several():
        return
    every = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    others = np.flatnonzero(every != every[0]).tolist()
    if others:
        raise ValueError(
            f"processes {others} have a different {what} from process 0; use the same files and "
            "the same command on all hosts"
        )


def check_shared(directory: str | os.PathLike) -> None:
    """Creates a directory and checks that all processes see the same one.

    Raises:
      ValueError: if some processes do not see it, because each host has its own.
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
            f"processes {blind} do not see what process 0 writes in {directory}; use a --workdir "
            "on a file system that all hosts share"
        )
