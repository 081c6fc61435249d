"""However one process ends, the others end soon after, with a line that says why."""

import shlex
import subprocess
import sys
import time

import pytest

from tests.distributed.launching import HERE, LOCAL, command, environment, finish, run, start

AGAIN = "run the same command to continue from the last checkpoint"


def ends(who, how, processes=2):
    return run(command(processes, HERE / "ending.py", who, how), environment(""))


def said(errors):
    """Returns the programs' lines, without those of the launcher and of jax's own service."""
    return sorted(line for line in errors if "error: " in line)


def test_a_fault_of_one_is_told_by_all():
    status, _, errors = ends(1, "fault")
    assert status == 2
    assert said(errors) == [
        "[0] error: process 1 ended with an error: the reward is faulty; mend it",
        "[1] error: the reward is faulty; mend it (--debug shows where)",
    ]


def test_the_end_of_process_0_is_told_by_the_others():
    begin = time.monotonic()
    status, _, errors = ends(0, "killed", processes=3)
    assert time.monotonic() - begin < 60
    assert status == 128 + 9
    lines = said(errors)  # from the connection, or from the service if it noticed first
    assert [line.partition(" error: process 0 has ended")[0] for line in lines] == ["[1]", "[2]"]
    assert all(line.endswith(AGAIN) for line in lines)


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_stops_all_after_the_same_step(who):
    status, output, errors = ends(who, "stopped")
    assert status == 0 and not errors
    (step,) = {line[4:] for line in output}
    assert len(output) == 2 and step.startswith("stops after step")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "killed in peace"])
def test_a_killed_process_is_missed(how):
    """The others are in a collective operation, or working on the host."""
    begin = time.monotonic()
    status, _, errors = ends(2, how, processes=3)
    assert time.monotonic() - begin < 60
    assert status == 128 + 9
    why = "process 2 has stopped responding (killed, out of memory, or its machine is gone)"
    assert said(errors) == [f"[{i}] error: {why}; {AGAIN}" for i in (0, 1)]


@pytest.mark.slow
def test_a_fault_of_process_0_is_told_before_it_goes():
    status, _, errors = ends(0, "fault", processes=3)
    why = "the reward is faulty; mend it"
    assert status == 2
    assert said(errors) == [
        f"[0] error: {why} (--debug shows where)",
        *(f"[{i}] error: process 0 ended with an error: {why}" for i in (1, 2)),
    ]


@pytest.mark.slow
def test_one_line_where_all_find_the_same_fault():
    status, _, errors = ends(9, "same fault", processes=3)
    (line,) = said(errors)
    assert status == 2 and "everybody sees this" in line


@pytest.mark.slow
def test_a_bug_shows_its_traceback_once():
    status, _, errors = ends(0, "bug")
    assert status == 1
    assert sum("KeyError: 'a bug'" in line for line in errors) == 2
    assert "[0] KeyError: 'a bug'" in errors
    assert "[1] error: process 0 ended with an error: KeyError: 'a bug'" in errors


@pytest.mark.fast
def test_a_dry_run_prints_commands_that_work():
    arguments = [sys.executable, str(LOCAL), "--processes=2", "--devices_per_process=3"]
    show = [sys.executable, "-c", "import os; print(*sorted(os.environ), sep='\\n')"]
    printed = subprocess.run(
        [*arguments, "--dry_run", "--port=1234", "--", *show], capture_output=True, text=True
    )
    lines = printed.stdout.splitlines()
    assert printed.returncode == 0 and len(lines) == 2
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert words[:5] == [
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:1234",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={index}",
            "JAX_PLATFORMS=cpu",
            "JAX_NUM_CPU_DEVICES=3",
        ]
        assert words[5:] == show
    there = subprocess.run(lines[1], shell=True, capture_output=True, text=True).stdout.split()
    assert {"JAX_PROCESS_ID", "JAX_NUM_CPU_DEVICES"} <= set(there)


@pytest.mark.fast
def test_the_launcher_ends_with_the_first_status_and_waits_no_longer_than_told():
    code = (
        "import os, sys, time\n"
        "print(os.environ['JAX_PROCESS_ID'], flush=True)\n"
        "sys.exit(5) if os.environ['JAX_PROCESS_ID'] == '1' else time.sleep(60)\n"
    )
    begin = time.monotonic()
    process = start(command(3, "-c", code, options=["--patience=0.5"]), environment(""))
    status, output, errors = finish(process)
    assert status == 5 and time.monotonic() - begin < 30
    assert sorted(output) == ["[0] 0", "[1] 1", "[2] 2"]
    assert "launch: process 1 ended with 5" in errors
    assert "launch: process 0 did not end, killed" in errors


@pytest.mark.fast
def test_the_launcher_passes_signals_on():
    code = "import time; print('here', flush=True); time.sleep(60)"
    process = start(command(2, "-c", code), environment(""))
    for _ in range(2):
        process.stdout.readline()
    process.terminate()
    status, _, errors = finish(process)
    assert status == 128 + 15
    assert sum("was ended by SIGTERM" in line for line in errors) == 2
