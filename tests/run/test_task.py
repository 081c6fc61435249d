"""What a run checks before it trains: every record, with file and line; and what it says."""

import dataclasses
import json
import types

import numpy as np
import pytest

from jaxrl_stable import data, sft, train
from jaxrl_stable.checkpoint import Checkpointer, has_checkpoints
from jaxrl_stable.configs import Data, Evaluation, Experiment, Reinforcement, Supervised
from jaxrl_stable.model import tiny
from jaxrl_stable.run import cold_start
from jaxrl_stable.run.judge import Judged
from jaxrl_stable.run.samples import sample_rows
from jaxrl_stable.run.task import Task, load_task
from jaxrl_stable.sharding import make_mesh

LONG = {"prompt": "1+1?", "answer": "1 " * 40 + "#### 2"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def sums(*numbers):
    return [{"prompt": f"{n}+1?", "answer": f"#### {n + 1}"} for n in numbers]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "digits.model"
    data.train_sentencepiece(["0123456789+1? #### 10", "#### 2"], path, 22)
    return str(path)


@pytest.fixture
def experiment(tmp_path, tokenizer_path):
    """Two files of sums, five problems each, one of them in both."""
    return Experiment(
        model=tiny(vocab_size=96),
        data=Data(
            train=write(tmp_path / "train.jsonl", *sums(1, 2, 3, 4, 5)),
            heldout=write(tmp_path / "heldout.jsonl", *sums(5, 6, 7, 8, 9)),
            tokenizer=tokenizer_path,
        ),
        cold_start=Supervised(steps=1, batch_size=1, length=48),
        reinforcement=Reinforcement(prompts=4, group_size=2, micro_batch_size=1),
        evaluation=Evaluation(problems=5, samples=1),
    )


def with_data(experiment, **changes):
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **changes))


def with_demonstrations(experiment, demonstrations):
    return dataclasses.replace(
        experiment,
        cold_start=dataclasses.replace(experiment.cold_start, demonstrations=demonstrations),
    )


@pytest.mark.fast
def test_one_line_says_how_many_held_out_prompts_are_trained_on(experiment, tmp_path, capsys):
    load_task(experiment, tmp_path)
    assert capsys.readouterr().out == "1 of 5 held-out prompts are in the training set\n"
    other = with_data(experiment, train=write(tmp_path / "other.jsonl", *sums(11, 12)))
    load_task(other, tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.fast
def test_a_template_that_ends_turns_otherwise_is_reported(experiment, tmp_path, capsys):
    from tests.data.test_turns import loaded

    directory = tmp_path / "tokenizer"
    directory.mkdir()
    loaded(directory, "chatml", jinja="{{ messages[-1].content }}")
    changes = dict(tokenizer=str(directory), chat=True)
    model = dataclasses.replace(experiment.model, vocab_size=320)
    load_task(with_data(dataclasses.replace(experiment, model=model), **changes), tmp_path)
    first, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("the chat template writes nothing after an assistant's answer")


@pytest.mark.fast
def test_demonstrations_are_checked_before_anything_is_trained(experiment, tmp_path):
    path = write(tmp_path / "demonstrations.jsonl", *sums(1, 2), LONG, *sums(3))
    faulty = with_demonstrations(experiment, path)
    message = (
        r"demonstrations\.jsonl, line 3: the example has \d+ tokens, more than .*affected: 1 of 4"
    )
    with pytest.raises(ValueError, match=message):
        load_task(faulty, tmp_path, cold_start=True)
    # The training problems are the demonstrations by default. Their answers are references too.
    path = write(tmp_path / "long.jsonl", LONG)
    with pytest.raises(ValueError, match=r"long\.jsonl, line 1: the example has"):
        load_task(with_data(experiment, train=path), tmp_path, cold_start=True)
    with pytest.raises(ValueError, match=r"long\.jsonl, line 1: the example has"):
        load_task(with_data(experiment, train=[experiment.data.train, path]), tmp_path, True)
    load_task(with_data(experiment, train=path), tmp_path)  # no cold start: not limited by its rows
    good = with_demonstrations(experiment, [experiment.data.train, experiment.data.heldout])
    assert len(load_task(good, tmp_path, cold_start=True).demonstrations) == 10


@pytest.mark.fast
def test_a_model_has_no_positions_beyond_its_context(experiment, tmp_path):
    short = lambda n: dataclasses.replace(  # noqa: E731
        experiment,
        model=dataclasses.replace(experiment.model, max_positions=n),
        data=dataclasses.replace(experiment.data, prompt_width=16),
        reinforcement=dataclasses.replace(experiment.reinforcement, max_tokens=4),
    )
    short(20)
    with pytest.raises(
        ValueError, match=r"Data\.prompt_width \+ Reinforcement\.max_tokens is 16 \+ 4"
    ):
        short(19)
    evaluation = dataclasses.replace(experiment.evaluation, max_tokens=5)
    with pytest.raises(
        ValueError, match=r"Data\.prompt_width \+ Evaluation\.max_tokens is 16 \+ 5"
    ):
        dataclasses.replace(short(20), evaluation=evaluation)
    dataclasses.replace(short(0), evaluation=evaluation)  # not known
    # A packed row may be longer than the context, an example may not.
    longer = dataclasses.replace(short(20), cold_start=Supervised(length=99))
    load_task(longer, tmp_path, cold_start=True)
    with pytest.raises(
        ValueError, match=r"line 1: the example has \d+ tokens, more than the 20 posi"
    ):
        load_task(with_demonstrations(longer, write(tmp_path / "l.jsonl", LONG)), tmp_path, True)


def test_columns_of_a_file_reach_the_reward(experiment, tmp_path):
    """The reward is tried on its first problem, so a missing column would be an error here."""
    columns = {"tests": ["#### 2", "2"], "level": 3}
    path = write(tmp_path / "columns.jsonl", {**sums(1)[0], **columns})
    reward = "tests.rewards.user_rewards:passes_the_tests"
    with load_task(with_data(experiment, train=path, reward=reward), tmp_path) as task:
        (verdict,) = task.reward([task.train[0]], ["#### 2"])
    assert verdict.score == 6


def test_samples_keep_the_usual_fields_alone():
    """A column of a data set must not pass for a figure of the run."""
    problem = {"prompt": "p", "answer": "a", "log_weight": [9.0], "score": 7.0, "tests": "x" * 999}
    tokenizer = types.SimpleNamespace(eos_id=2, eos_ids=(2,), decode=lambda ids: "t")
    task = Task([], [], tokenizer, None)
    judged = Judged(np.ones(1, np.float32), np.zeros(1, int), np.ones(1, int), np.ones(1, bool))
    batch = types.SimpleNamespace(
        tokens=np.array([[3]]), response_mask=np.array([[True]]), logp_rollout=np.zeros((1, 1))
    )
    (row,) = sample_rows([problem], np.array([0]), judged, np.ones(1), batch, None, task)
    assert row.keys() == {"prompt", "answer", "response", "score", "status", "advantage", "tokens"}
    assert row["score"] == 1


@pytest.mark.fast
def test_a_text_that_no_tokenizer_can_learn_is_named(experiment, tmp_path):
    source = [*sums(1), {"prompt": "\ud83d", "answer": "#### 1"}]
    with pytest.raises(ValueError, match=r"\[1\]: field 'prompt' has half of a surrogate pair"):
        load_task(with_data(experiment, train=source, tokenizer=""), tmp_path)


class Loaded(Exception):
    pass


@pytest.mark.fast
def test_who_checks_the_demonstrations(experiment, tmp_path, monkeypatch):
    """A run that is past its cold start goes on without its demonstrations."""

    def load(experiment, workdir, cold_start=False):
        raise Loaded(cold_start)

    def asked(program):
        with pytest.raises(Loaded) as loaded:
            program(experiment, str(tmp_path))
        return loaded.value.args[0]

    monkeypatch.setattr(train, "load_task", load)
    monkeypatch.setattr(sft, "load_task", load)
    assert asked(train.train)
    (tmp_path / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    assert asked(train.train)
    with Checkpointer(tmp_path / "checkpoints", {}) as checkpoints:
        checkpoints.save(0, {"a": np.zeros(1)})
    assert has_checkpoints(tmp_path / "checkpoints")
    assert not asked(train.train)
    assert asked(sft.main)


@pytest.mark.fast
def test_the_cold_start_trains_on_what_was_checked(experiment, tmp_path, monkeypatch):
    def iterate(source, *args, **settings):
        raise Loaded(source)

    path = write(tmp_path / "demonstrations.jsonl", *sums(1, 2))
    given = with_demonstrations(experiment, path)
    monkeypatch.setattr(cold_start, "packed_iterator", iterate)
    mesh = make_mesh(experiment.mesh)
    for opened in (True, False):  # by `load_task`, or else by the cold start
        task = load_task(given, tmp_path, cold_start=opened)
        with pytest.raises(Loaded) as loaded:
            cold_start.run_cold_start(given, task, mesh, tmp_path)
        (source,) = loaded.value.args
        assert (source is task.demonstrations) == opened and len(source) == 2
