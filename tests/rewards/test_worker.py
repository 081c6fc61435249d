import gc
import os
import pathlib
import subprocess
import sys
import time

import pytest

from jaxrl_stable.rewards import Verdict, load_reward
from jaxrl_stable.rewards.worker import WorkerPool

PROBLEM = {"prompt": "?", "answer": "ab"}
REWARDS = "tests.rewards.user_rewards"
OK = Verdict(1.0, "ok")


@pytest.fixture(scope="module")
def misbehave():
    with load_reward(f"{REWARDS}:misbehave", timeout_s=0.5) as reward:
        yield reward


def is_running(pid):
    """Returns whether the process exists and is not a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.fast
def test_scores_in_order_on_several_workers():
    with load_reward(f"{REWARDS}:length", workers=2) as reward:
        responses = ["x" * n for n in range(20)] + ["é\ud800\x00\n"]
        verdicts = reward([PROBLEM] * 21, responses)
        assert verdicts == [Verdict(n / 2, "ok") for n in range(20)] + [Verdict(2.0, "ok")]
        # More than the capacity of a pipe.
        assert reward([PROBLEM], ["x" * 10_000_000]) == [Verdict(5e6, "ok")]


@pytest.mark.parametrize("how", ["sleep", "spin"])
def test_overrun_is_killed_and_the_next_response_is_scored(misbehave, how):
    start = time.monotonic()
    assert misbehave([PROBLEM], [how]) == [Verdict(0.0, "timeout")]
    assert 0.4 < time.monotonic() - start < 1.5
    assert misbehave([PROBLEM], ["fine"]) == [OK]


def test_write_has_the_deadline_too():
    """Sends a request larger than the pipe to a process that does not read."""
    pool = WorkerPool(f"{REWARDS}:length", timeout_s=0.5)
    os.kill(pool._workers[0]._process.pid, __import__("signal").SIGSTOP)
    assert pool([PROBLEM], ["x" * 10_000_000]) == [Verdict(0.0, "timeout")]
    assert pool([PROBLEM], ["x"]) == [Verdict(0.5, "ok")]
    pool.close()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("how", "verdict"),
    [
        ("exit", Verdict(0.0, "error")),
        ("sys.exit", Verdict(0.0, "error")),
        ("raise", Verdict(0.0, "error")),
        ("print", OK),
        ("read", Verdict(0.0, "ok")),
        ("nan", Verdict(0.0, "error")),
        ("huge", Verdict(0.0, "error")),
        ("text", Verdict(0.0, "error")),
        ("none", Verdict(0.0, "error")),
        ("bool", OK),
        ("memory", Verdict(0.0, "error")),
        ("file", Verdict(0.0, "error")),
        ("time", OK),
        ("invalid", Verdict(0.0, "invalid")),
        ("status", Verdict(0.0, "error")),
        ("forge", Verdict(0.0, "error")),
        ("accelerator", OK),
    ],
)
def test_failures_are_errors_and_the_next_response_is_scored(misbehave, how, verdict):
    assert misbehave([PROBLEM] * 3, ["fine", how, "fine"]) == [OK, verdict, OK]


def test_what_the_function_started_is_killed_with_it(tmp_path):
    with load_reward(f"{REWARDS}:spawn", timeout_s=1.0) as reward:
        assert reward([PROBLEM], [str(tmp_path / "pid")]) == [Verdict(0.0, "timeout")]
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not is_running(pid))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "'no_such_module:f': ModuleNotFoundError: No module named 'no_such"),
        (
            f"{REWARDS}:absent",
            "AttributeError: .*has no attribute 'absent'; check the name",
        ),
        (
            f"{REWARDS}:NOT_A_FUNCTION",
            f"TypeError: {REWARDS}:NOT_A_FUNCTION is not a function",
        ),
    ],
)
def test_import_errors_are_reported_at_the_start(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(name)
    assert "\n" not in str(caught.value)


def test_a_module_that_ends_the_process_or_fails_to_parse(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ends.py").write_text("import os\nos._exit(1)\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(1)\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match="'ends:f': its process did not start"):
        load_reward("ends:f")
    with pytest.raises(ValueError, match="SystemExit: 1"):
        load_reward("exits:f")
    with pytest.raises(ValueError, match=r"SyntaxError: .*wrong\.py, line 1"):
        load_reward("wrong:f")


def test_a_directory_of_the_user_cannot_shadow_modules(tmp_path, monkeypatch):
    """The process starts in the working directory, which -P keeps off its path."""
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with load_reward(f"{REWARDS}:length") as reward:
        assert reward([PROBLEM], ["ab"]) == [OK]


def test_processes_end_with_close_collection_and_the_interpreter():
    closed, forgotten = WorkerPool(f"{REWARDS}:length"), WorkerPool(f"{REWARDS}:length")
    pids = [pool._workers[0]._process.pid for pool in (closed, forgotten)]
    assert all(map(is_running, pids))
    closed.close()
    closed.close()
    del forgotten
    gc.collect()
    assert wait_until(lambda: not any(map(is_running, pids)))

    script = (
        "from jaxrl_stable.rewards.worker import WorkerPool\n"
        f"pool = WorkerPool('{REWARDS}:length')\n"
        "print(pool._workers[0]._process.pid)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert wait_until(lambda: not is_running(int(run.stdout)))


def test_process_ends_without_its_parent():
    """Kills the parent with a signal that it cannot handle, while the process is idle."""
    script = (
        "import os, signal\n"
        "from jaxrl_stable.rewards.worker import WorkerPool\n"
        f"pool = WorkerPool('{REWARDS}:length')\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert wait_until(lambda: not is_running(int(run.stdout)))


def test_faulty_settings():
    for settings in ({"timeout_s": 0.0}, {"workers": 0}):
        with pytest.raises(ValueError, match="both must be positive"):
            load_reward(f"{REWARDS}:length", **settings)


def test_scalars_of_libraries_are_numbers_if_float32_holds_them():
    scores = {"np.bool": 1, "np.float32": 0.5, "0-d": 0.25, "Decimal": 0.75, "Fraction": 0.125}
    refused = ("1-d", "1e39", "complex", "bytes", "Decimal NaN")
    with load_reward(f"{REWARDS}:scalar") as reward:
        assert reward([PROBLEM] * 5, list(scores)) == [Verdict(x, "ok") for x in scores.values()]
        assert reward([PROBLEM], ["3.4e38"]) == [Verdict(3.4e38, "ok")]
        assert reward([PROBLEM] * 5, refused) == [Verdict(0.0, "error")] * 5
        assert "is not a finite number (5 of 5 failures)" in reward.failures()[0]


def test_failures_are_reported_once_per_kind_with_a_count(caplog):
    pool = WorkerPool(f"{REWARDS}:misbehave")
    with caplog.at_level("WARNING", logger="absl"):
        pool([PROBLEM] * 6, ["raise", "fine", "nan", "raise", "sys.exit", "raise"])
    pool([PROBLEM], ["fine"])
    pool.close()
    assert [line.partition(":")[0] for line in pool.failures] == [
        "RuntimeError",
        "TypeError",
        "SystemExit",
    ]
    assert pool.failures[0] == "RuntimeError: first line second line (3 of 5 failures)"
    assert len(caplog.records) == 3
