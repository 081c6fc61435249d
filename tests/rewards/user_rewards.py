"""Good and bad reward functions as users write them; workers import them by name."""

import decimal
import fractions
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from jaxrl_stable.rewards import Verdict


def length(problem, response):
    return len(response) / len(problem["answer"])


def misbehave(problem, response):
    """Does what the response asks for."""
    match response:
        case "sleep":
            time.sleep(3600)
        case "spin":
            while True:
                pass
        case "exit":
            os._exit(0)
        case "sys.exit":
            sys.exit(3)
        case "raise":
            raise RuntimeError("first line\nsecond line")
        case "print":
            print('{"score": 7.0, "status": "ok"}', flush=True)
            os.write(1, b'{"score": 8.0, "status": "ok"}\n')
            subprocess.run(["echo", '{"score": 9.0, "status": "ok"}'], check=True)
        case "read":
            return float(len(sys.stdin.read()))
        case "nan":
            return float("nan")
        case "huge":
            return 10**400
        case "text":
            return "1.0"
        case "none":
            return None
        case "bool":
            return True
        case "memory":
            mmap.mmap(-1, 9 << 30)  # reserved but never touched
        case "file":
            with tempfile.TemporaryFile() as file:
                file.truncate(2 << 30)  # sparse
        case "time":
            cpu, wall = resource.getrlimit(resource.RLIMIT_CPU)[0], signal.getitimer(0)[0]
            return float(0 < cpu < 3600 and 10 < wall < 12)
        case "invalid":
            return Verdict(0.0, "invalid")
        case "status":
            return Verdict(0.0, "fine")
        case "forge":
            for descriptor in range(3, 20):
                try:
                    os.write(descriptor, b'["forged"]\n')
                except OSError:
                    continue
        case "accelerator":
            return float(os.environ["JAX_PLATFORMS"] == "cpu")
    return 1.0


def scalar(problem, response):
    """Returns the value that the response names, as libraries return it."""
    return {
        "np.bool": np.bool_(True),
        "np.float32": np.float32(0.5),
        "0-d": np.array(0.25),
        "Decimal": decimal.Decimal("0.75"),
        "Fraction": fractions.Fraction(1, 8),
        "1-d": np.array([1.0]),
        "1e39": 1e39,
        "complex": 1j,
        "bytes": b"1",
        "Decimal NaN": decimal.Decimal("nan"),
        "3.4e38": 3.4e38,
    }[response]


def reads_tests_of_other_name(problem, response):
    return float(response == problem["unit_tests"])


def passes_the_tests(problem, response):
    """Reads columns of the data set."""
    return float(problem["level"] * sum(test in response for test in problem["tests"]))


def indexes_the_response(problem, response):
    return float(response[0] == problem["answer"][0])


async def asynchronous(problem, response):
    return 1.0


def batched(prompts, completions, answer):
    return [1.0] * len(prompts)


def keyword_only(problem, *, response):
    return 1.0


CALLS = iter(range(1_000_000))


def judge_that_dies(problem, response):
    """Judges the two responses that a run tries at its start."""
    if next(CALLS) >= 2:
        raise ConnectionError("the judge is down")
    return float(response == problem["answer"])


def graded(problem, response):
    return 9.0


graded.right_at = 8


def spawn(problem, response):
    """Starts a child, writes its process id to the file named in the response, and hangs."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(response, "w") as file:
        file.write(str(child.pid))
    time.sleep(3600)


NOT_A_FUNCTION = 3
