"""A run from a checkpoint, through a cold start, with a KL term: it goes on without its origin."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxrl_stable import configs, hf, sft, train
from jaxrl_stable.checkpoint import load_model
from jaxrl_stable.data import ArithmeticSource, train_sentencepiece
from jaxrl_stable.files import read_jsonl
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.run.fingerprint import fingerprint
from jaxrl_stable.run.origin import read_record
from jaxrl_stable.run.reference import kept_reference
from jaxrl_stable.sharding import abstract_state, make_mesh

TINY = str(pathlib.Path(__file__).parents[1] / "experiment.gin")
MODEL = tiny(vocab_size=96, hidden_size=32, num_layers=1, num_experts=4, moe_intermediate_size=16)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A Hugging Face checkpoint."""
    directory = tmp_path_factory.mktemp("origin") / "model"
    hf.save(init_model(MODEL, 5), directory)
    source = ArithmeticSource(size=64, steps=1, largest=9)
    texts = [text for i in range(64) for text in source[i].values()]
    train_sentencepiece([*texts, "\n"], directory / "tokenizer.model", 96)
    return directory


def experiment(origin, steps, kl=0.1, cold_steps=2):
    return load_experiment(
        [TINY],
        [
            f"configs.Experiment.init_from = '{origin}'",
            f"configs.Objective.kl_coefficient = {kl}",
            f"configs.Reinforcement.steps = {steps}",
            f"configs.Supervised.steps = {cold_steps}",
            "configs.Evaluation.every = 9",
            "rl/configs.Optimizer.weight_decay = 0.1",  # a policy without reward moves, too
        ],
    )


def mesh():
    return make_mesh(configs.MeshShape())


def weights(checkpoints):
    template = abstract_state(mesh(), lambda: init_model(MODEL, 0))
    return load_model(checkpoints, MODEL.architecture(), template)


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def interrupted(origin, tmp_path_factory):
    """One step of a run; `copy` of its working directory can go on in several ways."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    train.train(experiment(origin, steps=1), workdir)
    return workdir


@pytest.fixture
def copy(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


@pytest.fixture
def gone(origin, tmp_path):
    """The origin is elsewhere during a test."""
    moved = origin.rename(origin.with_name("moved"))
    yield origin
    moved.rename(origin)


def test_loaded_then_trained_supervised_then_by_reinforcement(interrupted):
    cold = weights(interrupted / "cold_start" / "checkpoints")
    first = init_model(MODEL, 5)
    distance = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (cold, first))))
    assert 0 < distance < 0.02  # two steps from the origin; a fresh model is far away
    assert_same(weights(interrupted / "origin" / "reference"), cold)
    record, loaded = read_record(interrupted), read_record(interrupted / "cold_start")
    assert record["weights"] == fingerprint(cold, mesh())
    assert loaded["loaded"] == fingerprint(first, mesh())
    assert record["tokenizer"]["kept"] == "origin/files/tokenizer.model"


def test_a_run_goes_on_without_its_origin(origin, copy, tmp_path, gone):
    """With the same reference: its KL is what it is in a run that was never interrupted."""
    shutil.rmtree(copy / "cold_start")
    train.train(experiment(origin, steps=2), copy)
    gone.with_name("moved").rename(gone)
    train.train(experiment(origin, steps=2), tmp_path / "whole")
    gone.rename(gone.with_name("moved"))
    ours, theirs = (read_jsonl(path / "metrics.jsonl")[-2:] for path in (copy, tmp_path / "whole"))
    for row, other in zip(ours, theirs, strict=True):
        timing = ("time", "throughput")
        assert {k: v for k, v in row.items() if not k.startswith(timing)} == {
            k: v for k, v in other.items() if not k.startswith(timing)
        }
    assert max(row.get("reference/kl", 0) for row in ours) > 0
    # A finished run needs nothing either.
    train.train(experiment(origin, steps=2), copy)


def test_a_longer_cold_start_is_refused(origin, copy):
    with pytest.raises(ValueError, match=r"Supervised\.steps is 2 there and 3 here\. Change them"):
        train.train(experiment(origin, steps=2, cold_steps=3), copy)


def test_a_kl_term_that_comes_later(origin, copy):
    """The reference is rebuilt, checked, and kept from then on."""
    shutil.rmtree(copy / "origin" / "reference")  # as if there had been no KL term
    reference = kept_reference(experiment(origin, steps=2), mesh(), copy)
    assert_same(reference, weights(copy / "cold_start" / "checkpoints"))
    shutil.rmtree(copy / "cold_start")
    assert_same(kept_reference(experiment(origin, steps=2), mesh(), copy), reference)


def test_a_reference_that_cannot_be_rebuilt(origin, copy):
    shutil.rmtree(copy / "origin" / "reference")
    shutil.rmtree(copy / "cold_start")
    with pytest.raises(ValueError, match="no longer holds the weights that this run started from"):
        kept_reference(experiment(origin, steps=2), mesh(), copy)
    alone = dataclasses.replace(experiment(origin, steps=2), init_from="")
    with pytest.raises(ValueError, match=r"cold_start/checkpoints is missing, and with it the ref"):
        kept_reference(alone, mesh(), copy)


def test_a_working_directory_without_a_record(origin, copy):
    """An older version read the origin again at every start."""
    shutil.rmtree(copy / "origin")
    kept_reference(experiment(origin, steps=2), mesh(), copy)
    assert read_record(copy).keys() == {"weights"}
    assert (copy / "origin" / "reference").is_dir()


def test_an_interrupted_first_start_leaves_no_reference_behind(origin, tmp_path, monkeypatch):
    """The cold start is done, but the run has no checkpoint yet: it may still be prolonged."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_programs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.train(experiment(origin, steps=1, cold_steps=1), tmp_path)
    old = weights(tmp_path / "origin" / "reference")
    train.train(experiment(origin, steps=1, cold_steps=2), tmp_path)
    new = weights(tmp_path / "origin" / "reference")
    assert_same(new, weights(tmp_path / "cold_start" / "checkpoints"))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (new, old))))


def test_supervised_training_alone_starts_from_the_origin(origin, interrupted, tmp_path):
    once = experiment(origin, steps=1)
    sft.main(once, str(tmp_path))
    cold = weights(interrupted / "cold_start" / "checkpoints")
    assert_same(weights(tmp_path / "checkpoints"), cold)
    losses = [
        json.loads(line)["sft/loss"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 1
    other = dataclasses.replace(once, init_from=str(interrupted))
    with pytest.raises(ValueError, match=r"Experiment\.init_from is '.*model' there and '.*run'"):
        sft.main(other, str(tmp_path))
