"""What a run started from, kept in its working directory so that it can resume without its origin.

    origin/record.json   source and copy of the tokenizer, fingerprint of the first weights
    origin/files/        tokenizer, chat template, generation settings and `config.json`
    origin/reference/    first weights, if the objective has a KL term (see `reference`)

The files are written at the first start. They are used once the run has a checkpoint; until then,
every start rewrites them. Working directories from older versions lack these files, so their runs
still read from the origin.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

from jax.sharding import Mesh

from jaxrl_stable import hf
from jaxrl_stable.checkpoint import has_checkpoints, load_model, stored_architecture
from jaxrl_stable.configs import Experiment
from jaxrl_stable.files import read_json, write_atomic
from jaxrl_stable.hf.save import companions
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.sharding import abstract_state, sharded_init

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Copied along with a tokenizer whose directory is not a model directory.
SPECIAL_TOKENS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
COMPANIONS = (*TOKENIZERS, *SPECIAL_TOKENS, "chat_template.jinja")


def load_origin(experiment: Experiment, mesh: Mesh) -> Transformer:
    """Returns the weights before any training: loaded from `init_from`, or random.

    Raises:
      ValueError, FileNotFoundError: if `init_from` holds no weights of this model.
    """

    def fresh_model() -> Transformer:
        return init_model(experiment.model, experiment.seed)

    if not experiment.init_from:
        return sharded_init(mesh, fresh_model)
    origin = pathlib.Path(experiment.init_from)
    if (origin / "config.json").exists():
        return hf.load(origin, mesh, experiment.model)
    template = abstract_state(mesh, fresh_model)
    return load_model(origin / "checkpoints", experiment.model.architecture(), template)


def has_started(workdir: pathlib.Path) -> bool:
    """Returns whether a run, or its cold start, has a checkpoint to resume from."""
    return any(map(has_checkpoints, _checkpoint_folders(workdir)))


def model_of_run(workdir: pathlib.Path, **execution: Any) -> ModelConfig | None:
    """Returns the model config of a run with a checkpoint, else None; see `hf.config.resuming`.

    Args:
      workdir: directory of the run.
      **execution: fields of `ModelConfig` that a checkpoint does not specify.
    """
    for folder in _checkpoint_folders(workdir):
        if has_checkpoints(folder):
            return ModelConfig.from_architecture(stored_architecture(folder), **execution)
    return None


def _checkpoint_folders(workdir: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    return workdir / "checkpoints", workdir / "cold_start" / "checkpoints"


# --- The record and the kept files. Process 0 writes; all processes read. -------------------------


def read_record(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the record of a run; empty if an older version started it."""
    return read_json(workdir / "origin" / "record.json")


def write_record(workdir: pathlib.Path, **entries: Any) -> None:
    """Adds entries to the record."""
    record = read_record(workdir) | entries
    write_atomic(workdir / "origin" / "record.json", json.dumps(record, indent=2) + "\n")


def keep_files(experiment: Experiment, tokenizer: pathlib.Path, workdir: pathlib.Path) -> None:
    """Copies tokenizer, chat template and `config.json`, and begins a new record.

    A tokenizer that was trained for this run is already in its working directory.

    Args:
      experiment: the experiment.
      tokenizer: file or directory of the tokenizer.
      workdir: directory of the run.
    """
    target = workdir / "origin" / "files"
    shutil.rmtree(target.parent, ignore_errors=True)  # an earlier start may have left others
    entries: dict[str, Any] = {"init_from": experiment.init_from}
    if experiment.data.tokenizer or experiment.init_from:
        target.mkdir(parents=True)
        directory = tokenizer if tokenizer.is_dir() else tokenizer.parent
        of_a_model = (directory / "config.json").exists()
        files = companions(directory) if of_a_model else [directory / name for name in COMPANIONS]
        if experiment.init_from:
            files.append(pathlib.Path(experiment.init_from, "config.json"))
        if not tokenizer.is_dir():
            files.append(tokenizer)
        for file in files:
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            elif file.exists():
                shutil.copyfile(file, target / file.name)
        kept = target if tokenizer.is_dir() else target / tokenizer.name
        entries["tokenizer"] = {
            "from": experiment.data.tokenizer,
            "kept": kept.relative_to(workdir).as_posix(),
        }
    write_record(workdir, **entries)


def kept_tokenizer(workdir: pathlib.Path) -> pathlib.Path | None:
    """Returns the path of a run's kept tokenizer, a file or a directory, or None if missing."""
    tokenizer = read_record(workdir).get("tokenizer")
    return workdir / tokenizer["kept"] if tokenizer else None


def find_tokenizer(experiment: Experiment, workdir: pathlib.Path) -> pathlib.Path:
    """Returns the tokenizer's path: kept by this run, configured, from `init_from`, or trained.

    Raises:
      ValueError: if `init_from` has no tokenizer (a new one would change what its embeddings mean),
        or if `Data.tokenizer` is not the tokenizer that the run started with.
    """
    given, kept = experiment.data.tokenizer, kept_tokenizer(workdir)
    if kept is not None and has_started(workdir):
        if not given or _same(pathlib.Path(given), kept):
            return kept
        if not pathlib.Path(given).exists() and given == read_record(workdir)["tokenizer"]["from"]:
            return kept
        raise ValueError(
            f"Data.tokenizer is {given}, which is not the tokenizer that this run started with; "
            f"set it to {kept}, or start a new run in another --workdir"
        )
    if given:
        return pathlib.Path(given)
    if not experiment.init_from:
        return workdir / "tokenizer.model"
    origin = pathlib.Path(experiment.init_from).resolve()
    for directory in (origin, origin.parent):  # a cold start uses its run's tokenizer
        kept = kept_tokenizer(directory)
        found = [*([kept] if kept else []), *(directory / name for name in TOKENIZERS)]
        for path in found:
            if path.exists():
                return path
    raise ValueError(
        f"Experiment.init_from {experiment.init_from} has no tokenizer; set Data.tokenizer to the "
        "one that its weights were trained with"
    )


def _same(given: pathlib.Path, kept: pathlib.Path) -> bool:
    """Returns whether two tokenizers, each a file or its directory, have the same content."""
    files = [_file(given), _file(kept)]
    if not all(file.is_file() for file in files):
        return False
    ours, theirs = (
        [file.read_bytes(), *(read_json(file.with_name(name)) for name in SPECIAL_TOKENS)]
        for file in files
    )
    return ours == theirs


def _file(tokenizer: pathlib.Path) -> pathlib.Path:
    if not tokenizer.is_dir():
        return tokenizer
    names = [name for name in TOKENIZERS if (tokenizer / name).exists()]
    return tokenizer / (names or TOKENIZERS)[0]
