"""Optional copy of a run's scalars in Weights & Biases, switched on by `Experiment.wandb_project`.

The record of a run stays metrics.jsonl. wandb reads everything else (API key, entity, mode) from
its own environment variables; `WANDB_MODE=offline` needs no network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import secrets
import types
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from jaxrl_stable import distributed
from jaxrl_stable.files import write_atomic
from jaxrl_stable.objective import name_of

RUN_ID = "wandb_run_id"  # file in the working directory


def check_installed(project: str) -> None:
    """Checks that wandb can be imported if a project is set. Only process 0 needs it.

    Raises:
      ValueError: if it cannot be imported.
    """
    if project and distributed.is_main():
        _wandb()


class WandbLog:
    """Copies rows of scalars to one wandb run.

    The id of the wandb run is kept in the working directory, so that a resumed run continues it;
    repeated steps are logged again. If wandb fails (no API key, no network), one warning is logged
    and the run continues without it.

    Args:
      workdir: existing directory of the run. wandb keeps its own files in it.
      project: wandb project.
      config: the experiment; becomes the configuration of the wandb run.

    Raises:
      ValueError: if wandb is not installed.
    """

    def __init__(self, workdir: str | os.PathLike, project: str, config: Any):
        wandb, directory = _wandb(), pathlib.Path(workdir).resolve()
        self._run: Any = None
        with self._or_without_it():
            self._run = wandb.init(
                project=project,
                id=_run_id(directory),
                name=_name(directory),
                resume="allow",
                dir=str(directory),
                config=plain(config),
            )
            # wandb's own step never goes back, but a resumed run does.
            self._run.define_metric("*", step_metric="step")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Logs one row of scalars; a step may have several."""
        if self._run is not None:
            with self._or_without_it():
                self._run.log({**row, "step": step})

    def close(self, failed: bool = False) -> None:
        """Ends the wandb run and waits until it is uploaded."""
        if self._run is not None:
            with self._or_without_it():
                self._run.finish(exit_code=int(failed))
            self._run = None

    @contextlib.contextmanager
    def _or_without_it(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # training matters more than a copy of its metrics
            self._run = None
            message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            logging.warning("wandb: %s; the run continues without it", message)


def plain(value: Any) -> Any:
    """Returns an experiment as nested dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, functools.partial):
        return {"function": name_of(value)} | plain(value.keywords)
    if isinstance(value, types.FunctionType):
        return {"function": name_of(value)}
    return repr(value)  # such as a source of problems


def _wandb() -> Any:
    try:
        import wandb  # optional, and the import takes a second

        wandb.init  # noqa: B018  an earlier run's directory ./wandb can be imported, too
    except (ImportError, AttributeError):
        raise ValueError(
            "Experiment.wandb_project is set but wandb is not installed; pip install "
            "'jaxrl_stable[wandb]', or clear it"
        ) from None
    return wandb


def _run_id(directory: pathlib.Path) -> str:
    path = directory / RUN_ID
    if not path.exists():
        write_atomic(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()


def _name(directory: pathlib.Path) -> str:
    """Returns the directory's name; for a cold start, the run's name precedes it."""
    parts = directory.parts[-2:] if directory.name == "cold_start" else directory.parts[-1:]
    return "/".join(parts)
