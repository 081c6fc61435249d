"""Weights & Biases: the calls of its package, and that its errors do not stop a run."""

import json
import math
import pathlib
import sys
import types

import pytest

from jaxrl_stable import distributed, gin_files, train
from jaxrl_stable.configs import Experiment
from jaxrl_stable.distributed.preemption import Stopped
from jaxrl_stable.files import read_jsonl
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.objectives import gspo
from jaxrl_stable.run.describe import describe
from jaxrl_stable.run.wandb_log import RUN_ID, WandbLog, plain
from jaxrl_stable.run.writer import MetricsWriter, NoWriter, open_writer

TINY = str(pathlib.Path(__file__).parents[1] / "experiment.gin")

pytestmark = pytest.mark.fast


class FakeRun:
    """Records calls; those in `broken` fail."""

    def __init__(self, broken=()):
        self.calls, self.broken = [], broken

    def _call(self, name, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        if name in self.broken:
            raise ConnectionError(f"{name}:\n no network")

    def define_metric(self, *args, **kwargs):
        self._call("define_metric", *args, **kwargs)

    def log(self, *args, **kwargs):
        self._call("log", *args, **kwargs)

    def finish(self, *args, **kwargs):
        self._call("finish", *args, **kwargs)

    def names(self):
        return [name for name, _, _ in self.calls]


@pytest.fixture
def wandb(monkeypatch):
    """A fake package `wandb` that records calls of `init` and the runs that it returns."""
    fake = types.ModuleType("wandb")
    fake.started, fake.runs, fake.broken = [], [], ()

    def init(**settings):
        fake.started.append(settings)
        if "init" in fake.broken:
            raise RuntimeError("no API key")
        fake.runs.append(FakeRun(fake.broken))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)


def writer(workdir, **settings):
    return MetricsWriter(workdir, console=False, wandb_project="stable", **settings)


def test_what_is_sent(wandb, tmp_path):
    with writer(tmp_path / "one", config=Experiment(seed=7)) as out:
        out.write(3, {"reward/mean": 0.5, "entropy": math.nan})
        out.write(3, {"eval/avg_at_k": 0.25})
    (started,), (run,) = wandb.started, wandb.runs
    assert started.pop("config")["seed"] == 7
    identity = (tmp_path / "one" / RUN_ID).read_text().strip()
    assert started == {
        "project": "stable",
        "id": identity,
        "name": "one",
        "resume": "allow",
        "dir": str(tmp_path / "one"),
    }
    (_, (first,), _), (_, (second,), _) = run.calls[1:3]
    assert run.calls[0] == ("define_metric", ("*",), {"step_metric": "step"})
    assert math.isnan(first.pop("entropy")) and first == {"reward/mean": 0.5, "step": 3}
    assert second == {"eval/avg_at_k": 0.25, "step": 3}
    assert run.calls[3:] == [("finish", (), {"exit_code": 0})]


def test_a_resumed_run_continues_its_wandb_run_and_no_other(wandb, tmp_path):
    for workdir in ("one", "one", "other", "one/cold_start"):
        writer(tmp_path / workdir).close()
    one, again, other, cold_start = (each["id"] for each in wandb.started)
    assert one == again and len({one, other, cold_start}) == 3
    assert wandb.started[-1]["name"] == "one/cold_start"


@pytest.mark.parametrize(("error", "code"), [(RuntimeError, 1), (Stopped, 0)])
def test_only_a_run_that_broke_is_marked_as_failed(wandb, tmp_path, error, code):
    with pytest.raises(error), writer(tmp_path):
        raise error(4, "here")
    assert wandb.runs[0].calls[-1] == ("finish", (), {"exit_code": code})


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_a_failure_of_wandb_is_one_warning(wandb, tmp_path, broken, caplog):
    wandb.broken = (broken,)
    with caplog.at_level("WARNING", logger="absl"), writer(tmp_path) as out:
        for step in range(3):
            out.write(step, {"x": step})
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("wandb: no API key" if broken == "init" else f"wandb: {broken}: no")
    assert message.endswith("; the run continues without it") and "\n" not in message
    assert [row["x"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    if broken == "log":
        assert wandb.runs[0].names() == ["define_metric", "log"]


def test_off_by_default(wandb, tmp_path):
    with open_writer(tmp_path, console=False) as out:
        out.write(1, {"x": 1.0})
    assert not wandb.started and not (tmp_path / RUN_ID).exists()


def test_only_process_0_has_a_run(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with open_writer(tmp_path, wandb_project="stable") as out:
        assert isinstance(out, NoWriter)
        out.write(1, {"x": 1.0})
    assert not wandb.started


def experiment():
    bindings = ["configs.Experiment.wandb_project='stable'"]
    return load_experiment([TINY], [*bindings, "configs.Objective.loss=@objectives.gspo"])


def test_a_missing_package_is_an_error_before_anything_runs(absent, tmp_path):
    message = (
        r"^Experiment.wandb_project is set but wandb is not installed; pip install "
        r"'jaxrl_stable\[wandb\]', or clear it$"
    )
    with pytest.raises(ValueError, match=message):
        describe(experiment())  # a dry run
    with pytest.raises(ValueError, match=message):
        train.train(experiment(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    """wandb leaves such a folder where it was started; Python imports it as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="wandb is not installed"):
        WandbLog(tmp_path, "stable", None)
    sys.modules.pop("wandb", None)


def test_the_experiment_as_its_configuration(wandb):
    config = plain(experiment())
    assert json.loads(json.dumps(config)) == config
    assert config["reinforcement"]["objective"]["loss"] == {"function": gspo.__name__}
    assert config["model"]["num_experts"] == 4
    assert "wandb project 'stable'" in describe(experiment())


def test_options_of_a_loss_are_part_of_the_configuration():
    bound = load_experiment([TINY], ["objectives.minirl.truncation=7.0"])
    loss = plain(bound)["reinforcement"]["objective"]["loss"]
    assert loss == {"function": "minirl", "truncation": 7.0}


def test_a_resolved_configuration_from_before_the_field_still_loads(tmp_path):
    """The field, with its default, is the only difference."""
    load_experiment([TINY], ["configs.Experiment.wandb_project=''"])
    resolved = gin_files.resolved_config()
    (line,) = [line for line in resolved.splitlines() if "wandb_project" in line]
    old = tmp_path / "config.gin"
    old.write_text(resolved.replace(line + "\n", ""))
    assert load_experiment([str(old)]).wandb_project == ""
    assert gin_files.resolved_config().replace(line + "\n", "") == old.read_text()
