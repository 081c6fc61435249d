"""Joint shutdown of the processes of a run, each of which prints the reason in one line.

A process that fails reports why through JAX's coordination service, which runs in process 0. A
process that dies stops sending heartbeats. In both cases every other process prints one line and
exits, even if its main thread is blocked in a collective operation that will never finish. Exit
status 2 means that the user has to fix something, 1 that the same command can continue the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # its key-value store has no public name

from jaxrl_stable.distributed.processes import BARRIER, is_main, several, wait_for_all

BEAT = 2.0  # seconds between heartbeats
DEAD = 20.0  # seconds without a heartbeat after which a process counts as dead
BROKEN_DEAD = 3 * BEAT  # like DEAD, once a process has reported a broken connection
GRACE = 2.0  # seconds that a process has to notice another process's error
FAILED, BROKEN, ALIVE, PORT = (
    f"jaxrl_stable/{name}" for name in ("failed", "broken", "alive", "port")
)
NOTHING = "null"  # value of FAILED after a normal end
AGAIN = "run the same command to continue from the last checkpoint"
# Words in errors that only show that another process is gone.
ECHOES = ("Gloo", "UNAVAILABLE", "Connection reset", "Connection closed", "oordination service")

_leaving = threading.Lock()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends all processes of a program together, regardless of why one of them ends.

    With several processes, an error does not propagate out of this context. It ends the process at
    once, because an orderly exit would wait for the others.
    """
    if not several():
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()
    with _line_to_process_0(over):
        status = 0
        try:
            yield
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            status = 1
            if report(f"{type(error).__name__}: {error}", status):
                traceback.print_exc()
        if status:
            report(f"exit status {status}", status)  # unless a report was sent already
            _leave(status)
        wait_for_all("end")
        over.set()
        if is_main():
            global_state.client.key_value_set(FAILED, NOTHING)  # wakes the watch threads
        watch.join()
        jax.distributed.shutdown()  # waits for all processes; the connection stays open until then


def report(message: str, status: int = 2) -> bool:
    """Tells the other processes that this one is ending, and why.

    An error that is only a consequence of another process's end is held back. Meanwhile, the watch
    thread learns the real reason and ends this process with it.

    Args:
      message: reason, in one line.
      status: exit status of all processes.

    Returns:
      True if this process should print the message; False if another process already has.
    """
    if not several():
        return True
    client = global_state.client
    if any(word in message for word in ECHOES):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(BROKEN, "", allow_overwrite=True)
        time.sleep(DEAD + 2 * BEAT + GRACE)
    try:
        client.key_value_set(FAILED, json.dumps([global_state.process_id, status, message]))
    except jax.errors.JaxRuntimeError:  # another process was first, or process 0 is gone
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return json.loads(client.key_value_try_get(FAILED))[2] != message
    return True


def _watch(over: threading.Event) -> None:
    """Sends heartbeats and exits when a peer fails. Process 0 also detects dead peers."""
    client, me = global_state.client, global_state.process_id
    beats = {str(i): ("", time.monotonic()) for i in range(global_state.num_processes)}
    while not over.is_set():
        try:
            client.key_value_set(f"{ALIVE}/{me}", str(time.time_ns()), allow_overwrite=True)
            if me == 0:
                _look_for_the_dead(client, beats)
            failed = client.blocking_key_value_get(FAILED, int(1000 * BEAT))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):  # nobody has failed
                continue
            if not over.is_set():
                _leave(1, f"process 0 has ended or is unreachable; {AGAIN}")
            return
        if failed == NOTHING:
            return
        process, status, message = json.loads(failed)
        if process == me:
            return  # the main thread ends this process
        time.sleep(GRACE)
        if process is not None:
            message = f"process {process} ended with an error: {message}"
        _leave(status, message)


def _look_for_the_dead(client: Any, beats: dict[str, tuple[str, float]]) -> None:
    """Records when each heartbeat last changed, and reports processes whose heartbeat stopped."""
    now, limit = time.monotonic(), DEAD
    for key, beat in client.key_value_dir_get(ALIVE):
        name = key.rpartition("/")[2]
        if beats[name][0] != beat:
            beats[name] = beat, now
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # not found
        client.key_value_try_get(BROKEN)
        limit = BROKEN_DEAD
    dead = [name for name, (_, since) in beats.items() if now - since > limit]
    if dead:
        message = (
            f"process {', '.join(dead)} has stopped responding (killed, out of memory, or its "
            f"machine is gone); {AGAIN}"
        )
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            client.key_value_set(FAILED, json.dumps([None, 1, message]))


def _line_to_process_0(over: threading.Event) -> contextlib.AbstractContextManager:
    """Connects every process to process 0, so that the others notice at once when it ends.

    When process 0 ends, JAX's service aborts the others with a long traceback. Thanks to this
    connection, our one-line message comes first. No data is sent; if the connection fails, only the
    traceback appears.
    """
    client, processes = global_state.client, global_state.num_processes
    if is_main():
        listening = socket.create_server(("", 0), backlog=processes)
        client.key_value_set(PORT, str(listening.getsockname()[1]))
        return listening
    host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
    address = host, int(client.blocking_key_value_get(PORT, 1000 * BARRIER))
    threading.Thread(target=_hold, args=(address, over), daemon=True).start()
    return contextlib.nullcontext()


def _hold(address: tuple[str, int], over: threading.Event) -> None:
    """Holds a connection to process 0; if reconnecting is refused, process 0 has exited."""
    held = False
    while not over.is_set():
        try:
            with socket.create_connection(address, timeout=60) as line:
                held = True
                line.settimeout(None)
                line.recv(1)
        except ConnectionRefusedError:
            if held and not over.is_set():
                _leave(1, f"process 0 has ended; {AGAIN}")
            return
        except ConnectionResetError:  # possibly only an idle connection that was dropped
            continue
        except OSError:
            return


def _leave(status: int, message: str = "") -> NoReturn:
    """Ends this process at once; process 0 first waits for its peers to read the report."""
    _leaving.acquire()  # never released: only one thread reports
    if message:
        os.write(2, f"error: {message}\n".encode())  # bypasses buffers that another thread may hold
    if is_main():
        time.sleep(2 * GRACE)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
