"""How the processes of a run end: together, each with a line that says why.

A process that fails says why to the others through jax's coordination service, which lives in
process 0; one that dies stops its heartbeat. Either way every other process prints one line and
ends, also where its main thread waits in a collective operation that will never finish. Exit status
2 means that there is something to mend, 1 that the same command may go on.
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
DEAD = 20.0  # seconds without one after which a process counts as dead
BROKEN_DEAD = 3 * BEAT  # the same once a process has found a connection broken
GRACE = 2.0  # seconds in which a process may find the fault that another one reports
FAILED, BROKEN, ALIVE, PORT = (
    f"jaxrl_stable/{name}" for name in ("failed", "broken", "alive", "port")
)
NOTHING = "null"  # instead of a failure: the end of the program
AGAIN = "run the same command to go on from the last checkpoint"
# Words of an error that only says that another process is gone.
ECHOES = ("Gloo", "UNAVAILABLE", "Connection reset", "Connection closed", "oordination service")

_leaving = threading.Lock()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends the processes of a program together, whatever ends one of them.

    With several processes an error does not leave this context: it ends the process, as an orderly
    way out would wait for the others.
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
            report(f"exit status {status}", status)  # unless it has said more
            _leave(status)
        wait_for_all("end")
        over.set()
        if is_main():
            global_state.client.key_value_set(FAILED, NOTHING)  # wakes the watches
        watch.join()
        jax.distributed.shutdown()  # returns when all are here: until then the line is held


def report(message: str, status: int = 2) -> bool:
    """Tells the other processes that this one ends, and why.

    An error that only echoes the end of another process is held back: the watch soon knows the
    reason, and ends this process with it.

    Returns:
      Whether this process should print the message: not where another one has said the same.
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
    except jax.errors.JaxRuntimeError:  # another one was first, or process 0 is gone
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return json.loads(client.key_value_try_get(FAILED))[2] != message
    return True


def _watch(over: threading.Event) -> None:
    """Beats, and ends this process when another one has failed. Process 0 looks for the dead."""
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
                _leave(1, f"process 0 has ended, or is out of reach; {AGAIN}")
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
    """Notes since when each process has the beat it has, and reports those that have stopped."""
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
            f"process {', '.join(dead)} gives no sign of life (killed, out of memory, or its "
            f"machine is gone); {AGAIN}"
        )
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a process was first
            client.key_value_set(FAILED, json.dumps([None, 1, message]))


def _line_to_process_0(over: threading.Event) -> contextlib.AbstractContextManager:
    """Connects all processes with process 0, to see at once when it ends.

    Then jax's service aborts the others with a page of its own; the line from here should stand
    first. Nothing is ever sent. Where no connection comes about, that page is what there is.
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
    """Keeps a connection to process 0; that it refuses another one is its end."""
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
        except ConnectionResetError:  # or only an idle connection was cut on its way
            continue
        except OSError:
            return


def _leave(status: int, message: str = "") -> NoReturn:
    """Ends the process at once. Process 0 takes the service with it, so it lets others read."""
    _leaving.acquire()  # for good: one thread says why
    if message:
        os.write(2, f"error: {message}\n".encode())  # not through a buffer that another one holds
    if is_main():
        time.sleep(2 * GRACE)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
