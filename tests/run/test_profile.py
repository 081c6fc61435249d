"""Profiles of chosen steps: which are traced, and what a run leaves behind."""

import gzip
import json
import pathlib

import jax
import pytest

from jaxrl_stable import distributed, train
from jaxrl_stable.files import read_jsonl
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.run.profile import Profiler, ProfileSteps, parse_profile_steps

TINY = str(pathlib.Path(__file__).parents[1] / "experiment.gin")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "steps"),
    [("", None), ("3", (3, 3)), ("3:6", (3, 6)), ("1:1", (1, 1)), ("07:10", (7, 10))],
)
def test_steps_from_the_command_line(text, steps):
    assert parse_profile_steps(text) == steps


@pytest.mark.fast
@pytest.mark.parametrize(
    "text", ["6:3", "0", "0:2", "-1", "3:", ":3", "3-6", "3:6:9", " 3", "3\n", "x"]
)
def test_steps_that_are_refused(text):
    with pytest.raises(
        ValueError, match=r"^--profile_steps is .*; write FIRST:LAST, for example 3:6$"
    ):
        parse_profile_steps(text)


@pytest.fixture
def events(monkeypatch):
    """Records what the profiler is asked to do, in order."""
    seen = []

    class Annotation(jax.profiler.StepTraceAnnotation):
        def __init__(self, name, step_num):
            super().__init__(name, step_num=step_num)
            seen.append((name, step_num))

    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    return seen


@pytest.mark.fast
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, [1, 2, 3, 4]),
        ((2, 3), [1, "start", 2, 3, "stop", 4]),
        ((1, 1), ["start", 1, "stop", 2, 3, 4]),
        ((4, 9), [1, 2, 3, "start", 4, "stop"]),  # the run ends first
        ((7, 9), [1, 2, 3, 4]),
    ],
)
def test_the_trace_covers_the_chosen_steps(events, tmp_path, steps, expected):
    with Profiler(tmp_path, steps and ProfileSteps(*steps)) as profiler:
        for number in range(1, 5):
            with profiler.step(number):
                pass
    assert events == [("train", each) if isinstance(each, int) else each for each in expected]


@pytest.mark.fast
def test_a_resumed_run_traces_what_is_left_of_the_range(events, tmp_path):
    with Profiler(tmp_path, ProfileSteps(2, 4)) as profiler:
        for number in range(4, 6):
            with profiler.step(number):
                pass
    assert events == ["start", ("train", 4), "stop", ("train", 5)]


@pytest.mark.fast
def test_an_error_in_a_traced_step_still_writes_the_trace(events, tmp_path):
    profiler = Profiler(tmp_path, ProfileSteps(1, 2))
    with pytest.raises(RuntimeError), profiler, profiler.step(1):
        raise RuntimeError
    assert events == ["start", ("train", 1), "stop"]


@pytest.mark.fast
def test_a_trace_that_cannot_be_written_does_not_end_the_run(events, tmp_path, monkeypatch):
    def fail():
        events.append("stop")
        raise ValueError("Invalid trace folder")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with Profiler(tmp_path, ProfileSteps(1, 1)) as profiler:
        for number in (1, 2):
            with profiler.step(number):
                pass
    assert events == ["start", ("train", 1), "stop", ("train", 2)]


@pytest.mark.fast
def test_each_of_several_processes_has_a_directory(events, tmp_path, monkeypatch):
    """They would write files of one name, and jax's Perfetto export wants just one."""
    seen = []
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: seen.append((a, k)))
    with Profiler(tmp_path, ProfileSteps(1, 1)) as profiler, profiler.step(1):
        pass
    directory = str(tmp_path / "tensorboard" / "process_3")
    assert seen == [((directory,), {"create_perfetto_trace": False})]


def test_a_run_leaves_a_profile_of_its_second_step(tmp_path):
    bindings = [
        "configs.Experiment.cold_start=None",
        "configs.Reinforcement.steps=3",
        "configs.Evaluation.every=3",
        "configs.Evaluation.problems=2",
    ]
    train.train(load_experiment([TINY], bindings), tmp_path, parse_profile_steps("2:2"))
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 3]
    (profile,) = (tmp_path / "tensorboard" / "plugins" / "profile").iterdir()
    assert [path.stat().st_size > 0 for path in profile.glob("*.xplane.pb")] == [True]
    with gzip.open(profile / "perfetto_trace.json.gz") as file:
        trace = json.load(file)["traceEvents"]
    assert {e["args"]["step_num"] for e in trace if e.get("name") == "train"} == {"2"}
    named = {event.get("name") for event in trace}
    assert {"rollout", "reward", "score", "update"} <= named
