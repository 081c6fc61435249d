"""Bad input ends in one line that names file, line or field and what to do, with status 2."""

import functools
import json
import pathlib
import sys

import pytest
from absl import flags

from jaxrl_stable import gin_files, program, train
from jaxrl_stable.hf import config as hf_config
from jaxrl_stable.model import qwen3_30b_a3b
from jaxrl_stable.run import programs
from jaxrl_stable.run.describe import describe

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
GIN = str(pathlib.Path(__file__).with_name("experiment.gin"))


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Runs the training program in this process and returns its one line of error."""

    def fail(*arguments, gin_file=GIN):
        argv = ["train", f"--gin_file={gin_file}", f"--workdir={tmp_path / 'run'}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as error:
            program.run(train.main)
        assert error.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    yield fail
    flags.FLAGS.unparse_flags()


def jsonl(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return f"--gin.configs.Data.train='{path}'"


GOOD = json.dumps({"prompt": "1+1?", "answer": "2"})


@pytest.mark.fast
def test_missing_file(fails, tmp_path):
    line = fails(f"--gin.configs.Data.train='{tmp_path}/absent.jsonl'")
    assert "absent.jsonl" in line and "check the path" in line


@pytest.mark.fast
def test_malformed_row(fails, tmp_path):
    line = fails(jsonl(tmp_path / "bad.jsonl", GOOD, "{not json"))
    assert "bad.jsonl" in line and "2" in line


def test_missing_field(fails, tmp_path):
    line = fails(jsonl(tmp_path / "bad.jsonl", GOOD, GOOD, '{"prompt": "x"}'))
    assert "bad.jsonl" in line and "3" in line and "answer" in line


def test_answer_of_wrong_type(fails, tmp_path):
    line = fails(jsonl(tmp_path / "bad.jsonl", '{"prompt": "1+1?", "answer": 2}'))
    assert "bad.jsonl" in line and "answer" in line and "quot" in line


def test_unreadable_reference(fails, tmp_path):
    line = fails(
        jsonl(tmp_path / "bad.jsonl", *[GOOD] * 60, '{"prompt": "x", "answer": "two"}'),
    )
    assert "bad.jsonl" in line and "two" in line


def test_empty_data_set(fails, tmp_path):
    assert "empty" in fails(jsonl(tmp_path / "empty.jsonl"))


def test_prompt_longer_than_the_limit(fails):
    line = fails("--gin.configs.Data.prompt_width=5")
    assert "prompt width of 5" in line and "tokens" in line


def test_unknown_gin_name(fails):
    line = fails("--gin.configs.Reinforcement.stepz=3")
    assert "stepz" in line and "configs.Reinforcement" in line
    line = fails("--gin.configs.Nothing.steps=3")
    assert "configs.Nothing" in line


def test_missing_gin_file(fails):
    assert "gin file nowhere.gin does not exist" in fails(gin_file="nowhere.gin")


def test_unknown_switch(fails):
    line = fails("--gin.configs.Objective.replay='R4'")
    assert "Objective.replay is 'R4'; use one of 'none', 'R2', 'R3'" in line


def test_sizes_that_do_not_fit(fails):
    line = fails("--gin.configs.Reinforcement.micro_batch_size=3")
    assert "micro_batch_size (3) must divide it" in line


@pytest.mark.fast
def test_a_length_penalty_for_an_estimator_without_one(fails):
    line = fails(
        "--gin.configs.Objective.advantages=@advantages.maxrl",
        "--gin.configs.Reinforcement.overlong_buffer=0.5",
        "--dry_run",
    )
    assert "Reinforcement.overlong_buffer adds a length penalty, but maxrl reads" in line


@pytest.mark.fast
def test_groups_of_one_with_their_own_baseline(fails):
    one = "--gin.configs.Reinforcement.group_size=1", "--gin.configs.Reinforcement.prompts=16"
    line = fails(*one, "--dry_run")
    assert "Reinforcement.group_size is 1, but centered compares the responses of a group" in line
    estimator = "--gin.configs.Objective.advantages=@advantages.reinforce_plus_plus"
    assert "but reinforce_plus_plus compares" in fails(*one, estimator, "--dry_run")
    whole = "--gin.advantages.reinforce_plus_plus.baseline=False"
    experiment = gin_files.load_experiment(
        [GIN], [x.removeprefix("--gin.") for x in (*one, estimator, whole)]
    )
    assert experiment.reinforcement.group_size == 1


def test_rewards_that_the_advantages_are_not_made_for(fails):
    """Found in the first rollout, before the first update."""
    line = fails(
        "--gin.configs.Experiment.cold_start=None",
        "--gin.configs.Objective.advantages=@advantages.maxrl",
        "--gin.configs.Data.reward='tests.test_errors:plus_or_minus'",
    )
    assert "step 1: maxrl needs rewards of at least 0, but response 0 has -1; use" in line


def plus_or_minus(problem, response):
    return -1.0


def test_tokenizer_larger_than_the_model(fails):
    line = fails("--gin.model.tiny.vocab_size=64")
    assert "has 96 entries but ModelConfig.vocab_size is 64" in line


def test_unknown_reward(fails):
    assert "'guess'" in fails("--gin.configs.Data.reward='guess'")


def test_mesh_that_does_not_fit(fails):
    line = fails(
        "--gin.configs.Experiment.mesh=@configs.MeshShape()", "--gin.configs.MeshShape.data=3"
    )
    assert "does not fit" in line and "devices" in line


def test_missing_workdir(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", f"--gin_file={GIN}"])
    flags.FLAGS.unparse_flags()
    flags.FLAGS["workdir"].value = None
    with pytest.raises(SystemExit):
        program.run(train.main)
    assert "--workdir is missing" in capsys.readouterr().err
    flags.FLAGS.unparse_flags()


@pytest.mark.fast
def test_binding_without_effect(fails):
    """A section that is configured but not wired in would be silently ignored."""
    line = fails("--gin.configs.MeshShape.data=1")
    assert "configs.MeshShape.data is bound but nothing uses it" in line
    line = fails("--gin.reinforce/configs.Optimizer.b1=0.5")  # the scope is called rl
    assert "reinforce/configs.Optimizer.b1 is bound but nothing uses it" in line
    line = fails("--gin.configs.Optimizer.learning_rate=0.5")  # bound in scope rl
    assert "configs.Optimizer.learning_rate is bound but nothing uses it" in line


@pytest.mark.parametrize("field", ["Reinforcement.micro_batch_size", "Evaluation.every"])
def test_sizes_of_zero(fails, field):
    assert f"{field} is 0; use at least 1" in fails(f"--gin.configs.{field}=0")


def test_weights_without_their_tokenizer(fails, tmp_path):
    """A newly trained tokenizer would give other meanings to the embeddings of another run."""
    line = fails(f"--gin.configs.Experiment.init_from='{tmp_path}/a/b'")
    assert "has no tokenizer; set Data.tokenizer to the one" in line


def test_more_problems_than_there_are(fails):
    assert "Evaluation.problems is 9 but" in fails("--gin.configs.Evaluation.problems=9")


def test_first_mini_batch_that_disagrees_stops_the_run(fails, monkeypatch):
    """The gate in the loop: an update with another temperature than `score`."""
    wrong = functools.partial(programs.update, temperature=1.3)
    monkeypatch.setattr(programs, "update", lambda *x, temperature, **k: wrong(*x, **k))
    line = fails("--gin.configs.Supervised.steps=1")
    assert "in the first mini-batch, above 1e-05; score and update disagree" in line


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.gin")), ids=lambda path: path.stem)
def test_experiment_loads(path, tmp_path):
    text, files, bindings = path.read_text(), [str(path)], []
    if "ReasoningGym" in text:
        pytest.importorskip("reasoning_gym")
    if "Experiment." not in text:  # it is laid over another
        files.insert(0, str(EXPERIMENTS / "quickstart.gin"))
    if "CHECKPOINT" in text:
        _, content = hf_config.to_json(qwen3_30b_a3b())
        (tmp_path / "config.json").write_text(json.dumps(content))
        bindings = [f"CHECKPOINT = '{tmp_path}'"]
    assert "parameters" in describe(gin_files.load_experiment(files, bindings))
