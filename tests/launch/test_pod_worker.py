"""launch/worker.sh on one machine: what it reports about a run, and what it refuses."""

import os
import pathlib
import shlex
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "worker.sh"


@pytest.fixture
def worker(tmp_path):
    """Calls worker.sh on a machine where the package is installed; asserts success."""
    home = tmp_path / "jaxrl"
    (home / "source").mkdir(parents=True)
    (home / "venv/bin").mkdir(parents=True)
    (home / "venv/bin/python").symlink_to(sys.executable)

    def call(*words, status=0):
        environment = os.environ | {"HOME": str(tmp_path), "JAXRL_PAUSE": "0.05"}
        result = subprocess.run(
            ["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == status, result.stderr
        return (result.stdout if status == 0 else result.stderr).strip().partition(" ")[2]

    call.home = home
    yield call
    call("stop", "0")


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_states_of_runs_one_after_the_other(worker):
    assert worker("state") == "none"
    assert "nothing was started" in worker("log", "5", status=1)
    worker("start", "-", "bash", "-c", "echo one; exit 3")
    wait_for(lambda: worker("state") == "exit 3")
    worker("start", "-", "sleep", "60")
    assert worker("state") == "running"  # nothing is left of how the first one ended
    message = worker("start", "-", "sleep", "61", status=1)
    assert "a run is in progress: sleep 60" in message
    worker("stop", "5")
    assert worker("state") == "exit 143"


def test_a_process_number_of_an_earlier_boot_means_nothing(worker):
    with subprocess.Popen(["sleep", "60"]) as somebody_else:
        (worker.home / "boot").write_text("another\n")
        for name in ("pid", "supervisor"):
            (worker.home / name).write_text(str(somebody_else.pid))
        assert worker("state") == "lost"
        worker("stop", "0")
        worker("start", "-", "true")
        wait_for(lambda: worker("state") == "exit 0")
        assert somebody_else.poll() is None
        somebody_else.kill()


def test_the_run_is_on_its_own(worker):
    """Neither the end of the ssh session nor a signal to its processes reaches it."""
    show = "import os; print(os.getsid(0), os.environ['JAX_PLATFORMS'], os.getcwd())"
    worker("start", "-", "python", "-c", show)
    wait_for(lambda: worker("state") == "exit 0")
    session, platforms, folder = (worker.home / "log").read_text().split()
    assert int(session) != os.getsid(0)
    assert platforms == os.environ.get("JAX_PLATFORMS", "tpu,cpu")
    assert folder == str(worker.home / "source")


def test_stop_reaches_the_program_alone(worker):
    """A program's children, such as graders of answers, are left to the program."""
    child = "trap 'echo hit' TERM; echo up; while :; do sleep 0.05; done"
    program = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, lambda *_: None)\n"
        f"child = subprocess.Popen(['bash', '-c', {child!r}])\n"
        "signal.pause(); child.kill(); print('saved', flush=True)"
    )
    worker("start", "-", "python", "-c", program)
    wait_for(lambda: (worker.home / "log").read_text() == "up\n")
    worker("stop", "20")
    assert (worker.home / "log").read_text() == "up\nsaved\n"
    assert worker("state") == "exit 0"


def test_the_command_is_noted_as_it_was(worker):
    words = ["printf", "%s|", "a b", "", "$HOME", "'"]
    worker("start", "-", *words)
    wait_for(lambda: worker("state") == "exit 0")
    assert (worker.home / "log").read_text() == "a b||$HOME|'|"
    assert shlex.split((worker.home / "command").read_text()) == words
