"""What a run keeps of its origin: copies of the tokenizer's files, and the architecture."""

import json
import pathlib
import shutil
import sys

import pytest
from absl import flags

from jaxrl_stable import hf, program
from jaxrl_stable.checkpoint import Checkpointer
from jaxrl_stable.configs import Data, Experiment
from jaxrl_stable.hf.config import resuming
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.run.origin import (
    SPECIAL_TOKENS,
    find_tokenizer,
    has_started,
    keep_files,
    kept_tokenizer,
    model_of_run,
    read_record,
)

FROZEN = pathlib.Path(__file__).parents[1] / "hf" / "frozen" / "qwen3-moe.v5"

pytestmark = pytest.mark.fast


@pytest.fixture
def origin(tmp_path):
    """A model directory, without its weights."""
    directory = tmp_path / "origin"
    directory.mkdir()
    shutil.copy(FROZEN / "config.json", directory)
    for name in ("tokenizer.json", *SPECIAL_TOKENS):
        (directory / name).write_text(json.dumps({"file": name}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "merges.txt").write_text("a b")
    return directory


def started(workdir, phase="."):
    (workdir / phase / "checkpoints" / "0").mkdir(parents=True)
    return workdir


def names(workdir):
    return {path.name for path in (workdir / "origin" / "files").iterdir()}


def test_a_model_directory_is_kept_without_its_weights(origin, tmp_path):
    (origin / "model.safetensors").write_bytes(b"weights")
    experiment, workdir = Experiment(init_from=str(origin)), tmp_path / "run"
    tokenizer = find_tokenizer(experiment, workdir)
    assert tokenizer == origin / "tokenizer.json"
    keep_files(experiment, tokenizer, workdir)
    expected = {path.name for path in origin.iterdir()} - {"model.safetensors"}
    assert names(workdir) == expected
    for name in expected:
        kept = workdir / "origin" / "files" / name
        assert kept.read_bytes() == (origin / name).read_bytes()
    hf.read_config(workdir / "origin" / "files")  # usable in the origin's place
    # The copy counts once the run has a checkpoint: until then the origin may still be corrected.
    (origin / "tokenizer.json").write_text("corrected")
    assert find_tokenizer(experiment, workdir) == tokenizer
    started(workdir)
    shutil.rmtree(origin)
    assert find_tokenizer(experiment, workdir) == workdir / "origin" / "files" / "tokenizer.json"


@pytest.mark.parametrize("phase", [".", "cold_start"])
def test_the_copy_goes_with_the_working_directory(origin, tmp_path, phase):
    experiment = Experiment(init_from=str(origin))
    keep_files(experiment, origin / "tokenizer.json", tmp_path / "run")
    started(tmp_path / "run", phase)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert find_tokenizer(experiment, moved) == moved / "origin" / "files" / "tokenizer.json"


def test_a_run_can_start_from_a_run_whose_origin_is_gone(origin, tmp_path):
    keep_files(Experiment(init_from=str(origin)), origin / "tokenizer.json", tmp_path / "a")
    shutil.rmtree(origin)
    (tmp_path / "a" / "cold_start").mkdir()
    kept = (tmp_path / "a").resolve() / "origin" / "files" / "tokenizer.json"
    for start in (tmp_path / "a", tmp_path / "a" / "cold_start"):
        assert find_tokenizer(Experiment(init_from=str(start)), tmp_path / "b") == kept


def test_a_lone_file_is_kept_with_what_names_its_special_tokens(origin, tmp_path):
    """A directory that is not a model's may hold anything."""
    (origin / "config.json").unlink()
    (origin / "mine.json").write_text("{}")
    (origin / "tokenizer_notes").mkdir()
    experiment = Experiment(data=Data(tokenizer=str(origin / "mine.json")))
    keep_files(experiment, origin / "mine.json", started(tmp_path / "run"))
    assert names(tmp_path / "run") == {
        "mine.json",
        "tokenizer.json",
        "chat_template.jinja",
        *SPECIAL_TOKENS,
    }
    assert kept_tokenizer(tmp_path / "run").name == "mine.json"


def test_a_directory_stays_a_directory(origin, tmp_path):
    """The checksum of a directory is not the checksum of the file in it."""
    experiment = Experiment(data=Data(tokenizer=str(origin)))
    keep_files(experiment, origin, started(tmp_path / "run"))
    assert find_tokenizer(experiment, tmp_path / "run") == tmp_path / "run" / "origin" / "files"


def test_another_tokenizer_is_refused(origin, tmp_path):
    """Also by `evaluate`, which does not compare the data of a checkpoint."""
    experiment, workdir = Experiment(data=Data(tokenizer=str(origin))), started(tmp_path / "run")
    keep_files(experiment, origin, workdir)
    copy = shutil.copytree(origin, tmp_path / "copy")  # the same content elsewhere passes
    for path in (copy, copy / "tokenizer.json"):
        moved = Experiment(data=Data(tokenizer=str(path)))
        assert find_tokenizer(moved, workdir) == workdir / "origin" / "files"
    for name in ("tokenizer.json", *SPECIAL_TOKENS):
        before = (origin / name).read_text()
        (origin / name).write_text('{"other": 1}')
        with pytest.raises(ValueError, match="is not the tokenizer that this run started with"):
            find_tokenizer(experiment, workdir)
        (origin / name).write_text(before)
    with pytest.raises(ValueError, match="absent, which is not the tokenizer"):
        find_tokenizer(Experiment(data=Data(tokenizer=str(tmp_path / "absent"))), workdir)
    shutil.rmtree(origin)
    assert find_tokenizer(experiment, workdir) == workdir / "origin" / "files"


def test_a_start_that_came_to_nothing_leaves_no_trace(origin, tmp_path):
    keep_files(Experiment(init_from=str(origin)), origin / "tokenizer.json", tmp_path / "run")
    keep_files(Experiment(), tmp_path / "run" / "tokenizer.model", tmp_path / "run")
    assert read_record(tmp_path / "run") == {"init_from": ""}
    assert not (tmp_path / "run" / "origin" / "files").exists()


def test_what_counts_as_started(tmp_path):
    assert not has_started(tmp_path)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not has_started(tmp_path)
    assert has_started(started(tmp_path, "cold_start"))


def test_working_directory_of_an_older_version(origin, tmp_path):
    """It has no record, and goes on reading from its origin."""
    workdir = started(tmp_path / "run")
    assert find_tokenizer(Experiment(init_from=str(origin)), workdir).parent == origin.resolve()
    assert find_tokenizer(Experiment(), workdir) == workdir / "tokenizer.model"


@pytest.mark.parametrize("phase", [".", "cold_start"])
def test_a_resumed_run_knows_its_architecture(tmp_path, phase):
    """`model = @hf.read_config()` is read again at every start, also when the origin is gone."""
    config = tiny(vocab_size=16, hidden_size=16, num_layers=1, head_dim=8)

    def read(**execution):
        return hf.read_config(tmp_path / "gone", **execution)

    def model(**execution):
        return model_of_run(tmp_path, **execution)

    with resuming(model), pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read()
    with Checkpointer(tmp_path / phase / "checkpoints", config.architecture()) as checkpoints:
        checkpoints.save(0, {"model": init_model(config, 0)})
    with resuming(model):
        found = read(dtype="bfloat16", remat="block")
        assert found.architecture() == config.architecture()
        assert (found.dtype, found.remat) == ("bfloat16", "block")
        assert hf.read_config(FROZEN).architecture() != config.architecture()  # it exists
    with pytest.raises(FileNotFoundError):
        read()


GIN = """
from __gin__ import dynamic_registration
from jaxrl_stable import configs
from jaxrl_stable import hf

configs.Experiment.model = @hf.read_config()
hf.read_config.directory = "{}"
"""


def test_programs_find_the_architecture_in_the_working_directory(tmp_path, monkeypatch, capsys):
    config = tiny(vocab_size=16, hidden_size=16, num_layers=1, head_dim=8)
    with Checkpointer(tmp_path / "run" / "checkpoints", config.architecture()) as checkpoints:
        checkpoints.save(0, {"model": init_model(config, 0)})
    gin = tmp_path / "experiment.gin"
    gin.write_text(GIN.format(tmp_path / "gone"))
    arguments = [f"--gin_file={gin}", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    try:
        with pytest.raises(SystemExit) as end:
            kind = program.EXPERIMENT._replace(check=None)  # the experiment has no data
            program.run(lambda *_: pytest.fail("a dry run runs nothing"), kind)
    finally:
        flags.FLAGS.unparse_flags()
    assert not end.value.code
    assert "1 (1 with 8 experts" in capsys.readouterr().out
