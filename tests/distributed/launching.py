"""Starts programs in several processes, as a user would."""

import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
LOCAL = ROOT / "launch" / "local.py"
DEVICES = 4  # of every training run, over all its processes


def command(processes, *program, devices=1, options=()):
    return [
        sys.executable,
        str(LOCAL),
        f"--processes={processes}",
        f"--devices_per_process={devices}",
        *options,
        "--",
        sys.executable,
        *map(str, program),
    ]


def train(workdir, *flags, program="train"):
    files = (ROOT / "tests" / "experiment.gin", HERE / "processes.gin")
    gin = [f"--gin_file={file}" for file in files]
    return ["-m", f"jaxrl_stable.{program}", *gin, f"--workdir={workdir}", *flags]


def environment(cache):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def start(arguments, env):
    return subprocess.Popen(
        arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, timeout=300):
    """Returns the status and the lines of output and errors."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, output.splitlines(), errors.splitlines()


def run(arguments, env):
    return finish(start(arguments, env))


def children(process):
    """Returns the processes of a launcher, in order."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").iterdir()
    return sorted(int(pid) for task in tasks for pid in (task / "children").read_text().split())


def wait_until(ready, process, timeout=240):
    deadline = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
