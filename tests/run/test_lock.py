"""One working directory, one run: the second one ends with the first one's name."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jaxrl_stable import distributed, sft, train
from jaxrl_stable.gin_files import load, load_experiment
from jaxrl_stable.run import lock
from jaxrl_stable.run.lock import locked
from jaxrl_stable.study import __main__ as study
from jaxrl_stable.study.runner import run_study

TESTS = pathlib.Path(__file__).parents[1]
HOLD = """
import sys, time
from jaxrl_stable.run.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""

pytestmark = pytest.mark.fast


def test_second_run_names_the_first_one(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(lock.getpass, "getuser", lambda: "ann")
    owner = rf"run is in use by ann, process {os.getpid()} on node7, since 2\d{{3}}-[^\n]+; wait"
    with locked(tmp_path / "run"):
        for _ in range(2):  # the refused one leaves the name alone
            with pytest.raises(ValueError, match=owner), locked(tmp_path / "run"):
                pytest.fail("two owners")
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_every_program_that_writes_takes_the_lock(tmp_path):
    experiment = load_experiment([str(TESTS / "experiment.gin")])
    small = load([str(TESTS / "study" / "tiny.gin")], [], study.build)
    with locked(tmp_path):
        before = sorted(tmp_path.iterdir())
        for program in (
            lambda: train.train(experiment, tmp_path),
            lambda: sft.main(experiment, str(tmp_path)),
            lambda: run_study(small, tmp_path, show_progress=False),
        ):
            with pytest.raises(ValueError, match="is in use by"):
                program()
        assert sorted(tmp_path.iterdir()) == before


def test_a_killed_run_releases_the_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on"), locked(tmp_path):
            pytest.fail("two owners")
        process.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        (line,) = (tmp_path / "lock").read_text().splitlines()
        assert f"process {os.getpid()} on" in line


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path}/lock cannot be locked (") and "no other run" in line


def test_only_process_0_holds_the_lock(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setattr(distributed, "is_main", lambda: False)
        with locked(tmp_path):
            pass


def test_user_without_a_name(tmp_path, monkeypatch):
    """A container may run under a bare user id."""

    def getuser():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(lock.getpass, "getuser", getuser)
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"{os.getuid()}, process ")
