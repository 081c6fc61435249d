"""Runs a program in several processes on this machine.

    python launch/local.py --processes=4 -- \
        python -m jaxrl_stable.train --gin_file=experiments/quickstart.gin --workdir=runs/quickstart

Every process runs the same command; environment variables tell it its rank. Output lines start with
the number of the process. Exits with the status of the first failed process, or 0. After a
failure the other processes may end on their own; after `--patience` seconds they are killed. SIGINT
and SIGTERM are passed on to all. `--dry_run` prints one command per process, each ready for its own
shell.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the options, and the command after `--`."""
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description="Runs a program in several processes."
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices_per_process", type=int, default=1, metavar="N")
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--port", type=int, default=0, help="of process 0; a free one by default")
    parser.add_argument(
        "--patience", type=float, default=90, help="seconds that others may outlive a failure"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- python -m ...")
    options = parser.parse_args(arguments)
    options.command = options.command[options.command[:1] == ["--"] :]
    if not options.command:
        parser.error("the command is missing; write it after --")
    if min(options.processes, options.devices_per_process) < 1:
        parser.error("--processes and --devices_per_process must be at least 1")
    return options


def variables(options: argparse.Namespace, index: int, port: int) -> dict[str, str]:
    """Returns the environment of a process, read by `jaxrl_stable.distributed` and jax."""
    devices = options.devices_per_process
    place = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(options.processes),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": options.platform,
    }
    if options.platform == "cpu":
        return place | {"JAX_NUM_CPU_DEVICES": str(devices)}
    own = range(index * devices, (index + 1) * devices)
    return place | {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own))}


def free_port() -> int:
    """Returns a port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def copy_lines(source: BinaryIO, target: BinaryIO, prefix: bytes) -> None:
    """Copies lines until the source ends. Each line is written at once, so lines never mix."""
    for line in source:
        if line.startswith(b"[Gloo]"):  # Gloo reports every connection
            continue
        target.write(prefix + line.rstrip(b"\n") + b"\n")
        target.flush()


def end_of(status: int) -> str:
    """Describes how a process ended."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


def run(options: argparse.Namespace) -> int:
    """Starts the processes, waits for all, and returns the first status that is not 0."""
    port = options.port or free_port()
    processes, copies = [], []

    def pass_on(signum: int, _) -> None:
        for process in processes:
            process.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):  # before any process can be orphaned
        signal.signal(signum, pass_on)
    for index in range(options.processes):
        process = subprocess.Popen(
            options.command,
            env=os.environ | variables(options, index, port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # signals of the terminal arrive once, through here
        )
        processes.append(process)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            prefix = f"[{index}] ".encode()
            arguments = source, target.buffer, prefix
            copy = threading.Thread(target=copy_lines, args=arguments, daemon=True)
            copy.start()
            copies.append(copy)

    first, deadline = 0, float("inf")
    ended: set[int] = set()
    while len(ended) < len(processes):
        for index, process in enumerate(processes):
            if index in ended or process.poll() is None:
                continue
            ended.add(index)
            if process.returncode:
                print(f"launch: process {index} {end_of(process.returncode)}", file=sys.stderr)
                first = first or process.returncode
                deadline = min(deadline, time.monotonic() + options.patience)
        if time.monotonic() > deadline:
            for index in set(range(len(processes))) - ended:
                print(f"launch: process {index} did not end, killed", file=sys.stderr)
                processes[index].kill()
            deadline = float("inf")
        time.sleep(0.05)
    for copy in copies:
        copy.join(5)  # an orphan may still hold the pipe
    return 128 - first if first < 0 else first


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not options.dry_run:
        return run(options)
    port = options.port or free_port()
    for index in range(options.processes):
        place = (f"{name}={value}" for name, value in variables(options, index, port).items())
        print(" ".join([*place, shlex.join(options.command)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
