"""Runs a reward function in processes that can be killed.

Each process (`worker_main`) has its own process group and exchanges JSON lines over two pipes. It
gets one response at a time. If it exceeds its time limit, it is killed with everything it started,
then replaced. The parent measures the time by the wall clock: a signal in the child would not
interrupt a computation inside a C library. A process that leaves its group (`setsid`) escapes the
kill. This protects against accidents and answers that confuse a checker; it is not a sandbox for
code.
"""

import contextlib
import functools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging

from jaxrl_stable.rewards.verdict import Verdict

# Limit for starting Python and importing the function, in seconds.
_START_TIMEOUT = 120.0
# A reply is one short line; more bytes than this on the pipe come from other code.
_MAX_REPLY = 1 << 16


class WorkerDied(Exception):
    """Raised if the process ended, or closed or misused its pipe."""


class Worker:
    """One process and the pipes to it. Not thread-safe.

    Args:
      function: `"module:function"`, called as `function(problem: dict, response: str)` in the
        process, which has the parent's `sys.path` and no accelerator. It returns a finite number
        (any scalar that `float` accepts, except text) or a `Verdict`.
      timeout_s: wall-clock limit per response, in seconds.
      memory_bytes: limit of the process's address space.

    Attributes:
      right_at: score from which a response is right: the function's own attribute `right_at`, else
        1.

    Raises:
      ValueError: if the function cannot be imported or called.
    """

    def __init__(self, function: str, timeout_s: int | float, memory_bytes: int):
        self._function, self._timeout_s, self._memory_bytes = function, timeout_s, memory_bytes
        self._process: subprocess.Popen | None = None
        self._start()

    def score(self, problem: Mapping[str, Any], response: str) -> tuple[Verdict, str]:
        """Judges one response within the limit; after a failure it first starts a new process.

        Returns:
          The verdict, and why the checker failed ("" if it did not).
        """
        try:
            if self._process is None:
                self._start()
            request = {"problem": dict(problem), "response": response}
            reply = self._exchange(request, self._timeout_s)
            if "error" not in reply:
                return Verdict(float(reply["score"]), reply["status"]), ""
            return Verdict(0.0, "error"), reply["error"]
        except TimeoutError:
            self.close()
            return Verdict(0.0, "timeout"), f"killed after {self._timeout_s:g} s"
        # Not only failures of the function: code that it ran may have written to the pipe.
        except (WorkerDied, ValueError, TypeError, KeyError) as error:
            self.close()
            return Verdict(0.0, "error"), str(error)

    def close(self) -> None:
        """Kills the process and its whole group."""
        if self._process is not None:
            self._kill()
            self._process = None

    def _start(self) -> None:
        environment = dict(os.environ)
        # The function resolves as in the parent; -P stops Python from adding a directory.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # A function that imports jax or torch must not take the parent's accelerator.
        environment["JAX_PLATFORMS"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""
        settings = [self._function, str(self._timeout_s), str(self._memory_bytes)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxrl_stable.rewards.worker_main", *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        # Also runs when this object is garbage-collected and when the interpreter exits.
        self._kill = weakref.finalize(self, _kill_group, self._process)
        try:
            reply = self._exchange(None, _START_TIMEOUT)
        except (WorkerDied, TimeoutError) as error:
            self.close()
            raise ValueError(
                f"reward {self._function!r}: its process did not start ({error or 'no answer'}); "
                "see its standard error"
            ) from None
        if "error" in reply:
            self.close()
            raise ValueError(
                f"reward {self._function!r}: {reply['error']}; check the name and the PYTHONPATH"
            )
        self.right_at = float(reply["right_at"])

    def _exchange(self, request: dict | None, timeout_s: int | float) -> dict:
        """Sends a request, if any, and returns the reply.

        Raises:
          TimeoutError: if sending and receiving together take more than `timeout_s`.
          WorkerDied: if the process ends, or writes more than a reply.
        """
        deadline = time.monotonic() + timeout_s
        stdin, stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        unsent = memoryview(b"" if request is None else json.dumps(request).encode() + b"\n")
        received = b""
        while not received.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            poll = select.poll()  # select.select fails on descriptors above 1,023
            poll.register(stdout, select.POLLIN)
            if unsent:
                poll.register(stdin, select.POLLOUT)
            ready = {descriptor for descriptor, _ in poll.poll(1000 * remaining)}
            if stdin in ready:
                try:
                    unsent = unsent[os.write(stdin, unsent) :]
                except BrokenPipeError:
                    raise WorkerDied("its process ended before it had read the request") from None
            if stdout in ready:
                chunk = os.read(stdout, _MAX_REPLY)
                if not chunk:
                    raise WorkerDied("its process ended without a verdict")
                received += chunk
                if len(received) > _MAX_REPLY:
                    raise WorkerDied("its process wrote more than a verdict")
        return json.loads(received)


class WorkerPool:
    """Judges a batch of responses on several workers. See `Worker` for arguments and errors.

    Attributes:
      right_at: see `Worker`.
      failures: why the checker failed in the last call in which it did, most frequent first.
    """

    def __init__(
        self,
        function: str,
        *,
        timeout_s: int | float = 5.0,
        workers: int = 1,
        memory_bytes: int = 8 << 30,
    ):
        if timeout_s <= 0 or workers < 1:
            raise ValueError(
                f"reward {function!r}: timeout_s is {timeout_s} and workers is {workers}; "
                "both must be positive"
            )
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        start = functools.partial(Worker, function, timeout_s, memory_bytes)
        starts = [self._threads.submit(start) for _ in range(workers)]
        self._workers = [started.result() for started in starts]
        self.right_at = self._workers[0].right_at
        self.failures: list[str] = []
        self._function = function
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __call__(
        self, problems: Sequence[Mapping[str, Any]], responses: Sequence[str]
    ) -> list[Verdict]:
        scored = list(self._threads.map(self._score, problems, responses))
        reasons = [reason for verdict, reason in scored if verdict.failed]
        if reasons:
            self.failures = _kinds(reasons)
            for failure in self.failures:
                logging.warning("reward %s: %s", self._function, failure)
        return [verdict for verdict, _ in scored]

    def _score(self, problem: Mapping[str, Any], response: str) -> tuple[Verdict, str]:
        worker = self._idle.get()
        try:
            return worker.score(problem, response)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Waits for responses that are being judged, then kills all processes."""
        self._threads.shutdown()
        for worker in self._workers:
            worker.close()


def _kinds(reasons: Sequence[str]) -> list[str]:
    """Returns one line per kind of failure, most frequent first: its count and its first reason.

    Reasons are of one kind if they begin with the same words up to a colon, such as `KeyError:`.
    """
    kinds: dict[str, list[str]] = {}
    for reason in reasons:
        kinds.setdefault(reason.partition(":")[0], []).append(reason or "failed without a reason")
    ordered = sorted(kinds.values(), key=len, reverse=True)
    return [f"{each[0]} ({len(each)} of {len(reasons)} failures)" for each in ordered]


def _kill_group(process: subprocess.Popen) -> None:
    # The group outlives its leader, and its id is not reused before wait().
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        pipe.close()
