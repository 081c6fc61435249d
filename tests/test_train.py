"""Whole runs in their own processes: what a user starts, kills and starts again."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxrl_stable.files import read_jsonl

GIN = pathlib.Path(__file__).with_name("experiment.gin")


def command(workdir, *flags, program="train"):
    return [
        sys.executable,
        "-m",
        f"jaxrl_stable.{program}",
        f"--gin_file={GIN}",
        f"--workdir={workdir}",
        *flags,
    ]


@pytest.fixture(scope="session")
def environment():
    """Returns the environment of the session, with a compilation cache of its own.

    A cache that another process is writing can make a run print a warning.
    """
    cache = os.path.join(os.environ["JAX_COMPILATION_CACHE_DIR"], "runs")
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}


def run(workdir, environment, *flags, program="train"):
    return subprocess.run(
        command(workdir, *flags, program=program),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def interrupt(workdir, environment, ready, sig):
    """Starts a run and sends a signal as soon as `ready()`."""
    process = subprocess.Popen(
        command(workdir),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sig)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def arrays(workdir):
    """Returns every array of the newest checkpoint, by name."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(pathlib.Path(workdir, "checkpoints").resolve()) as orbax:
        loaded = orbax.load_checkpointables(orbax.latest.step, {"model": None, "optimizer": None})
    leaves = {}
    for part in ("model", "optimizer"):
        for name, leaf in loaded[part].items():
            leaves[part + name] = np.asarray(leaf)
    return orbax.latest.step, leaves


def steps(path):
    return [row["step"] for row in read_jsonl(path)] if path.exists() else []


@pytest.fixture(scope="session")
def finished(tmp_path_factory, environment):
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    result = run(workdir, environment)
    assert result.returncode == 0, result.stderr
    return workdir


def test_run_leaves_everything_behind(finished):
    for name in (
        "report.html",
        "metrics.jsonl",
        "samples.jsonl",
        "config.gin",
        "summary.json",
        "tokenizer.model",
        "plots/score.png",
        "cold_start/metrics.jsonl",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").iterdir())
    rows = read_jsonl(finished / "metrics.jsonl")
    trained = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval/avg_at_k" in row] == [0, 3, 6]
    expected = {
        "reward/mean",
        "reward/accuracy",
        "reward/failed_share",
        "reward/zero_variance_share",
        "response/length",
        "response/truncated_share",
        "entropy",
        "mismatch/kl_k1_token_mean",
        "mismatch/kl_k3_token_mean",
        "mismatch/abs_token_mean",
        "mismatch/abs_token_max",
        "weight/raw_mean",
        "weight/raw_max",
        "weight/used_mean",
        "weight/used_max",
        "weight/truncated_share",
        "weight/ess",
        "clip/high_share",
        "clip/low_share",
        "staleness/kl_k3_token_mean",
        "staleness/ratio_deviation_max",
        "validity/violating_share",
        "validity/value_error",
        "validity/mismatch_value_error",
        "validity/staleness_value_error",
        "gradient/norm",
        "gradient/skipped",
        "gradient/zero_share",
        "optimizer/learning_rate",
        "sampling/informative_share",
        "routing/agreement",
        "routing/agreement_layer_00",
        "routing/differing_tokens_share",
        "experts/max_violation",
        "throughput/tokens_per_s",
        "time/rollout",
        "time/reward",
        "time/score",
        "time/update",
        "time/step",
    }
    assert expected <= trained[0].keys()
    assert all(row[name] is not None for row in trained for name in expected)
    assert trained[0]["mismatch/kl_k3_token_mean"] > 0  # the int8 sampler is not the trainer


def test_the_learning_rates_are_recorded(finished):
    """The cold start is 8 steps into a warm-up of 50; reinforcement has a constant rate."""
    cold_start = read_jsonl(finished / "cold_start" / "metrics.jsonl")[-1]
    assert cold_start["optimizer/learning_rate"] == pytest.approx(1e-3 * 8 / 50)
    trained = [row for row in read_jsonl(finished / "metrics.jsonl") if "gradient/norm" in row]
    assert [row["optimizer/learning_rate"] for row in trained] == pytest.approx([1e-3] * 6)


def test_sampled_tokens_are_explained(finished):
    rows = read_jsonl(finished / "samples.jsonl")
    assert rows
    for row in rows:
        assert len(row["tokens"]) == len(row["log_weight"]) == len(row["differs"])
        assert {"prompt", "answer", "response", "score", "status", "advantage"} <= row.keys()


def assert_same_bits(workdir, finished):
    """Checks weights, optimizer and metrics of a run against the run without interruption."""
    (step, ours), (final, theirs) = arrays(workdir), arrays(finished)
    assert step == final == 6 and ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    again, once = (read_jsonl(path / "metrics.jsonl") for path in (workdir, finished))
    timing = ("time", "throughput")
    keep = lambda row: {k: v for k, v in row.items() if not k.startswith(timing)}  # noqa: E731
    assert [keep(row) for row in again] == [keep(row) for row in once]


def test_sigkill_and_restart_ends_with_the_same_bits(finished, tmp_path, environment):
    # In step 4 or later: past the checkpoint of step 2, with work to repeat.
    ready = lambda: max(steps(tmp_path / "metrics.jsonl"), default=0) >= 3  # noqa: E731
    code, _ = interrupt(tmp_path, environment, ready, signal.SIGKILL)
    assert code == -signal.SIGKILL
    result = run(tmp_path, environment)
    assert result.returncode == 0, result.stderr
    assert_same_bits(tmp_path, finished)


def test_sigkill_in_the_cold_start_then_sigterm(finished, tmp_path, environment):
    """The first start is killed, the second stopped; the third ends with the same bits."""
    # After the first checkpoint of the cold start, before its second.
    ready = (tmp_path / "cold_start" / "checkpoints" / "4").exists
    code, _ = interrupt(tmp_path, environment, ready, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not steps(tmp_path / "metrics.jsonl")

    ready = lambda: max(steps(tmp_path / "metrics.jsonl"), default=0) >= 1  # noqa: E731
    code, output = interrupt(tmp_path, environment, ready, signal.SIGTERM)
    assert code == 0, output
    assert "stopped by SIGTERM after step" in output
    stopped, _ = arrays(tmp_path)
    assert stopped == max(steps(tmp_path / "metrics.jsonl"))

    assert run(tmp_path, environment).returncode == 0
    assert_same_bits(tmp_path, finished)


def test_finished_run_only_writes_its_report(finished, environment):
    before = (finished / "metrics.jsonl").read_text()
    result = run(finished, environment)
    assert result.returncode == 0, result.stderr
    assert (finished / "metrics.jsonl").read_text() == before


def test_checkpoint_of_another_model(finished, environment):
    result = run(finished, environment, "--gin.model.tiny.num_heads=2")
    assert result.returncode == 2
    assert "holds a different model: num_heads is 4 there and 2 here" in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_evaluate(finished, environment):
    result = run(finished, environment, "--checkpoint=best", program="evaluate")
    assert result.returncode == 0, result.stderr
    assert "avg@2: " in result.stdout and "pass@2: " in result.stdout
    metrics = json.loads((finished / "evaluation.json").read_text())
    scored = [r for r in read_jsonl(finished / "metrics.jsonl") if "eval/avg_at_k" in r]
    best = max(scored, key=lambda row: (row["eval/avg_at_k"], row["step"]))
    assert metrics["eval/length"] > 1  # sampled by the same weights with the same key
    assert {k: v for k, v in metrics.items() if k.startswith("eval/")}.items() <= best.items()
    assert metrics["pass@1"] == pytest.approx(metrics["eval/avg_at_k"])  # unbiased at any k


DEAD_JUDGE = "--gin.configs.Data.reward='tests.rewards.user_rewards:judge_that_dies'"


def test_evaluation_by_a_dead_judge_has_no_score_and_fails(finished, environment):
    before = (finished / "evaluation.json").read_bytes()
    result = run(finished, environment, DEAD_JUDGE, program="evaluate")
    assert result.returncode == 2
    assert "failed on 100% of the samples" in result.stderr
    assert "ConnectionError: the judge is down (4 of 4 failures)" in result.stderr  # last batch
    assert "avg@2" not in result.stdout and "reward" not in result.stdout
    metrics = json.loads((finished / "evaluation.json").read_text())
    assert metrics["eval/failed_share"] == 1 and "eval/avg_at_k" not in metrics
    (finished / "evaluation.json").write_bytes(before)


def test_run_with_a_dead_judge_names_its_exception_and_keeps_the_samples(
    finished, tmp_path, environment
):
    origin = f"--gin.configs.Experiment.init_from='{finished}'"
    result = run(tmp_path, environment, DEAD_JUDGE, origin)
    assert result.returncode == 2
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: step 1: the reward failed on 100% of the responses, above 10%")
    assert "ConnectionError: the judge is down (16 of 16 failures)" in error
    assert "step 0: this evaluation has no score" in result.stdout
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["status"] for row in rows] == ["error"] * 4
    logged = [line for line in result.stderr.splitlines() if "judge is down" in line]
    assert len(logged) == 4  # two batches of the evaluation, the rollout, and the error


def test_start_from_another_run(finished, tmp_path, environment):
    flags = (
        f"--gin.configs.Experiment.init_from='{finished}'",
        "--gin.configs.Experiment.cold_start=None",
        "--gin.configs.Reinforcement.steps=1",
        "--gin.configs.Objective.mini_batches=1",
        "--gin.configs.Objective.replay='none'",
        "--gin.configs.Reinforcement.rollout_format='none'",
    )
    result = run(tmp_path, environment, *flags)
    assert result.returncode == 0, result.stderr
    first = read_jsonl(tmp_path / "metrics.jsonl")[0]
    last = read_jsonl(finished / "metrics.jsonl")[-1]
    for name in ("eval/avg_at_k", "eval/length", "eval/truncated_share"):  # same weights and key
        assert first[name] == last[name], name
    trained = read_jsonl(tmp_path / "metrics.jsonl")[1]
    # Measured in the update: there was no score pass.
    assert trained["mismatch/abs_token_max"] < 1e-4
    assert "staleness/kl_k3_token_mean" not in trained


def test_resume_with_another_seed_is_refused(finished, environment):
    """The data position and the key belong to the old one."""
    result = run(finished, environment, "--gin.configs.Experiment.seed=5")
    assert result.returncode == 2
    assert "seed 0 but the data is now" in result.stderr and "seed 5" in result.stderr


def test_dry_run_says_what_would_run(tmp_path, environment):
    result = run(tmp_path / "none", environment, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "configs.Objective.replay = 'R3'" in result.stdout
    assert "4 prompts × 4 = 16 rows × 56 tokens" in result.stdout
    assert "parameters" in result.stdout and "KiB" in result.stdout
    assert not (tmp_path / "none").exists()
