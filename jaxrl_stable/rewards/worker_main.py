"""The process behind `worker.Worker`: `python -m ...worker_main FUNCTION SECONDS BYTES`.

Reads requests `{"problem": ..., "response": ...}` and replies to each with `{"score": ...,
"status": ...}` or `{"error": ...}`, one JSON object per line. The very first line reports whether
the import succeeded: `{"right_at": ...}` or an error.
"""

import importlib
import inspect
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, get_args

from jaxrl_stable.rewards.verdict import Status, Verdict

_MAX_FILE_BYTES = 1 << 30
_MAX_ERROR_CHARACTERS = 500
# Rewards become float32 arrays; a larger number would become infinite there.
_MAX_SCORE = 3.4028234663852886e38


def main() -> None:
    name, timeout_s, memory_bytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    # Move the pipes to other descriptors: the function's output goes to standard error, its input
    # is empty, and processes that it starts inherit neither pipe.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)

    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, _MAX_FILE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    try:
        function = _import(name)
        right_at = as_score(getattr(function, "right_at", 1.0))
    except BaseException as error:  # including SystemExit in the user's module
        _write(replies, {"error": _describe(error)})
        return
    _write(replies, {"right_at": right_at})
    for line in requests:
        _allow_time(2 * timeout_s + 10)
        reply = _judge(function, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, reply)


def _import(name: str) -> Callable[[dict, str], Any]:
    module, _, attribute = name.partition(":")
    function = importlib.import_module(module)
    for part in attribute.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} is async; a reward is called as a plain function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions in C have none
        return function
    try:
        signature.bind({}, "")
    except TypeError as error:
        raise TypeError(
            f"{name}{signature} cannot be called with (problem, response): {error}"
        ) from None
    return function


def _judge(function: Callable[[dict, str], Any], request: dict) -> dict:
    try:
        result = function(request["problem"], request["response"])
        score, status = result if isinstance(result, Verdict) else (result, "ok")
        if status not in get_args(Status):
            raise ValueError(f"returned the unknown status {status!r}")
        return {"score": as_score(score), "status": status}
    except BaseException as error:  # including SystemExit and MemoryError
        return {"error": _describe(error)}


def as_score(value: Any) -> float:
    """Returns a scalar as a float: a Python or numpy number, a bool, a `Decimal`, a 0-d array.

    Raises:
      TypeError: if the value is not a scalar, or is not finite in float32.
    """
    scalar = not isinstance(value, str | bytes | bytearray) and getattr(value, "shape", ()) == ()
    try:
        score = float(value) if scalar else math.nan
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not abs(score) <= _MAX_SCORE:
        raise TypeError(f"returned {value!r}, which is not a finite number")
    return score


def _describe(error: BaseException) -> str:
    lines = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS].split("\n")
    return " ".join(lines)


def _write(replies: Any, message: dict) -> None:
    replies.write(json.dumps(message).encode() + b"\n")


def _limit(which: int, soft: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(which, (soft, hard))


def _allow_time(seconds: float) -> None:
    """Lets the kernel kill this process after `seconds` more, of wall time or CPU time per core.

    This matters only if the parent was killed; otherwise the parent acts much earlier. An idle
    process then exits anyway, because its pipe is closed.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    _limit(resource.RLIMIT_CPU, math.ceil(used + seconds * (os.cpu_count() or 1)))


if __name__ == "__main__":
    main()
