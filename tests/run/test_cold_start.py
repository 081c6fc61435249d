"""The loop of the cold start: what it logs, and the time per step that it reports."""

import pathlib
import types

import pytest

from jaxrl_stable.files import read_jsonl
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.run import cold_start
from jaxrl_stable.run.task import load_task
from jaxrl_stable.sharding import make_mesh

TINY = str(pathlib.Path(__file__).parents[1] / "experiment.gin")
SECONDS = 2.0  # per step


@pytest.fixture
def slow_steps(monkeypatch):
    """Makes each step take exactly `SECONDS` on a fake clock."""
    now = 0.0

    def shard_rows(*args):
        nonlocal now
        now += SECONDS
        return original(*args)

    original = cold_start.shard_rows
    monkeypatch.setattr(cold_start, "shard_rows", shard_rows)
    monkeypatch.setattr(cold_start, "time", types.SimpleNamespace(perf_counter=lambda: now))


def test_time_per_step_and_the_console(slow_steps, tmp_path, capsys):
    """The last interval is shorter than the others, and so is the first one after a resume."""

    def run(steps):
        experiment = load_experiment([TINY], [f"configs.Supervised.steps={steps}"])
        with load_task(experiment, tmp_path) as task:
            mesh = make_mesh(experiment.mesh)
            cold_start.run_cold_start(experiment, task, mesh, tmp_path / "cold_start")
        return read_jsonl(tmp_path / "cold_start" / "metrics.jsonl")

    rows = run(13)
    assert [(row["step"], row["time/step"]) for row in rows] == [(10, SECONDS), (13, SECONDS)]
    line = capsys.readouterr().out.splitlines()[-1]
    loss, entropy = (f"{rows[-1][name]:.3f}" for name in ("sft/loss", "sft/entropy"))
    assert line == f"step 13/13  loss {loss}  entropy {entropy}  s/step 2.000"
    rows = run(22)
    assert [row["step"] for row in rows] == [10, 13, 20, 22]
    assert {row["time/step"] for row in rows} == {SECONDS}
