"""A run in several processes equals a run in one, and can continue in any number of them."""

import json
import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

from jaxrl_stable.checkpoint import Checkpointer
from jaxrl_stable.files import read_jsonl
from tests.distributed.launching import (
    DEVICES,
    HERE,
    ROOT,
    children,
    command,
    environment,
    finish,
    run,
    start,
    train,
    wait_until,
)

LAST = 4  # steps of a run; a checkpoint every second one
# Counted on the host, and therefore equal; the others are sums in another order.
COUNTED = re.compile(r"step|reward/|response/|sampling/|gradient_steps|gradient/skipped|eval/")


@pytest.fixture(scope="session")
def env():
    """Returns the environment of the session, with a compilation cache of its own."""
    return environment(os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "processes"))


def launch(processes, workdir, *flags, program="train"):
    devices = DEVICES // processes
    return command(processes, *train(workdir, *flags, program=program), devices=devices)


def rows(workdir):
    return read_jsonl(workdir / "metrics.jsonl")


def same_run(ours, theirs):
    """Compares metrics and samples of two runs: counts exactly, the rest up to rounding."""
    assert [row["step"] for row in rows(ours)] == [row["step"] for row in rows(theirs)]
    for row, other in zip(rows(ours), rows(theirs), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if COUNTED.match(name):
                assert value == other[name], (row["step"], name)
            elif not name.startswith(("time", "throughput")):
                assert value == pytest.approx(other[name], rel=1e-3, abs=2e-6), (row["step"], name)
    samples = [read_jsonl(path / "samples.jsonl") for path in (ours, theirs)]
    for row, other in zip(*samples, strict=True):
        for name in ("step", "prompt", "response", "score", "status", "tokens", "differs"):
            assert row[name] == other[name], name
        np.testing.assert_allclose(row["advantage"], other["advantage"], atol=1e-6)
        np.testing.assert_allclose(row["log_weight"], other["log_weight"], atol=1e-4)


def checkpoints(workdir):
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()
    )


def position(workdir):
    """Returns the position in the data of the newest checkpoint."""
    with Checkpointer(workdir / "checkpoints", {}, reading=True) as newest:
        return newest._position(newest.steps[-1])


def kill(workdir, env, processes, victim, ready, flags=()):
    """Kills one process of a run; returns what the others print, and how long they take to end."""
    process = start(launch(processes, workdir, *flags), env)
    wait_until(ready, process)
    os.kill(children(process)[victim], signal.SIGKILL)
    begin = time.monotonic()
    status, _, errors = finish(process)
    assert status == 128 + signal.SIGKILL
    return [line for line in errors if "error: " in line], time.monotonic() - begin


def after(workdir, step):
    file = workdir / "metrics.jsonl"
    return lambda: file.exists() and max((r["step"] for r in rows(workdir)), default=0) >= step


@pytest.fixture(scope="session")
def alone(tmp_path_factory, env):
    """The run of one process that has all the devices."""
    workdir = tmp_path_factory.mktemp("alone")
    status, _, errors = run(launch(1, workdir), env)
    assert status == 0, errors
    assert any(0 < row["reward/mean"] < 1 for row in rows(workdir) if "reward/mean" in row)
    assert any(row.get("sampling/rounds") == 2 for row in rows(workdir))
    return workdir


@pytest.mark.slow  # CI runs this test and the next one
def test_what_processes_agree_on(tmp_path, env):
    frozen = ROOT / "tests" / "hf" / "frozen" / "qwen3-moe.v5"
    status, _, errors = run(command(2, HERE / "agreeing.py", tmp_path, frozen, devices=2), env)
    assert status == 0, errors
    assert len(list(tmp_path.glob("passed.*"))) == 2


@pytest.mark.slow
def test_killed_in_two_processes_and_finished_by_one_on_another_mesh(tmp_path, env, alone):
    flags = ("--gin.configs.MeshShape.fsdp=2", "--gin.configs.MeshShape.tensor=2")
    said, seconds = kill(tmp_path, env, 2, victim=1, ready=after(tmp_path, 3), flags=flags)
    assert seconds < 60
    assert len(said) == 1 and said[0].startswith("[0] error: process 1 has stopped responding")
    assert checkpoints(tmp_path)[-1] in (2, LAST)
    status, _, errors = run(launch(1, tmp_path), env)  # the programs of `alone`
    assert status == 0, errors
    same_run(tmp_path, alone)
    assert position(tmp_path) == position(alone)


def test_bad_input_is_one_line(tmp_path, env):
    status, _, errors = run(launch(2, tmp_path, "--gin.configs.Data.prompt_width=5"), env)
    assert status == 2
    (line,) = [line for line in errors if "error: " in line]
    assert "more than the prompt width of 5" in line


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_run_in_several_processes(processes, tmp_path, env, alone):
    status, output, errors = run(launch(processes, tmp_path), env)
    assert status == 0, errors
    assert all(line.startswith("[0] ") for line in output if "step" in line or "score" in line)
    same_run(tmp_path, alone)
    for name in ("report.html", "config.gin", "summary.json", "tokenizer.model"):
        assert (tmp_path / name).stat().st_size > 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    status, output, errors = run(launch(4 // processes, tmp_path, program="evaluate"), env)
    assert status == 0 and "avg@2" in "".join(output), errors
    last = json.loads((tmp_path / "evaluation.json").read_text())
    assert last["eval/avg_at_k"] == rows(tmp_path)[-1]["eval/avg_at_k"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_four_processes_then_two_then_four(tmp_path, env, alone):
    """The coordinator can be killed, too; a signal to any one process stops the run."""
    said, seconds = kill(tmp_path, env, 4, victim=2, ready=after(tmp_path, 1))
    assert seconds < 60 and len(said) == 3
    assert all("process 2 has stopped responding" in line for line in said)
    said, seconds = kill(tmp_path, env, 2, victim=0, ready=after(tmp_path, 3))
    assert seconds < 60 and "process 0 has ended" in said[0]
    status, _, errors = run(launch(4, tmp_path), env)
    assert status == 0, errors
    same_run(tmp_path, alone)


@pytest.mark.slow
def test_killed_while_saving(tmp_path, env, alone):
    """A half-written checkpoint does not count; both processes hold part of every checkpoint."""

    def saving():
        return any((tmp_path / "checkpoints").glob("2.*tmp*"))

    said, seconds = kill(tmp_path, env, 2, victim=1, ready=saving)
    assert seconds < 60 and len(said) == 1
    assert checkpoints(tmp_path)[-1] in (0, 2)
    status, _, errors = run(launch(2, tmp_path), env)
    assert status == 0, errors
    same_run(tmp_path, alone)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all(tmp_path, env, alone):
    process = start(launch(2, tmp_path), env)
    wait_until(after(tmp_path, 1), process)
    os.kill(children(process)[1], signal.SIGTERM)
    status, output, errors = finish(process)
    assert status == 0, errors
    (line,) = [line for line in output if "stopped by SIGTERM" in line]
    step = int(re.search(r"after step (\d+)", line).group(1))
    assert checkpoints(tmp_path)[-1] == step == max(row["step"] for row in rows(tmp_path))
    assert run(launch(1, tmp_path), env)[0] == 0
    same_run(tmp_path, alone)


@pytest.mark.slow
def test_cold_start_goes_on_in_another_number_of_processes(tmp_path, env):
    """The rows are packed identically: every process packs all of them."""
    flags = (
        "--gin.configs.Experiment.cold_start=@configs.Supervised()",
        "--gin.configs.Reinforcement.steps=1",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(launch(1, whole, *flags), env)[0] == 0
    short = (*flags, "--gin.configs.Supervised.steps=4")
    assert run(launch(2, cut, *short, program="sft"), env)[0] == 0
    (cut / "cold_start").mkdir()  # the reference program has no such folder
    for name in ("checkpoints", "metrics.jsonl"):
        os.rename(cut / name, cut / "cold_start" / name)
    status, _, errors = run(launch(1, cut, *flags), env)
    assert status == 0, errors
    ours, theirs = (rows(pathlib.Path(path, "cold_start"))[-1] for path in (cut, whole))
    assert ours["step"] == theirs["step"] == 8
    assert ours["sft/loss"] == pytest.approx(theirs["sft/loss"], rel=1e-6)
    same_run(cut, whole)
