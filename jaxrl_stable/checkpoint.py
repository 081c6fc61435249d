"""Checkpoints with Orbax: weights, optimiser, key, data position and step, written atomically.

All processes save and restore together; each handles the shards on its own devices. The number of
processes and the mesh may change in between: restored arrays take the shardings of their templates.

A checkpoint has named parts ("model", "optimizer", …) that can be restored separately. Each part is
stored flat, with one entry per array under its tree path, so it can be read without the classes
that wrote it. Orbax writes into a temporary directory and renames it, so a process that dies while
saving leaves the previous checkpoint as the newest.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxrl_stable.model.config import ModelConfig

SCORE = "score"
ABOUT = "about"  # metadata: architecture, array names of each part, data, settings and position
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.default is not dataclasses.MISSING
}


class Checkpointer:
    """Saves and restores the state of one run.

    Args:
      directory: the run's checkpoint directory.
      architecture: `ModelConfig.architecture()`; stored, and compared before anything is restored.
      keep: number of newest checkpoints to keep, in addition to the one with the best score.
      data: description of the data that positions refer to; compared before a position is restored.
      settings: further settings of the run, JSON values by name; compared together with the data.
        Settings that the checkpoint lacks are not compared.
      reading: whether to only read. If False, unfinished saves are deleted, even if a running
        process is still writing them.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        architecture: dict[str, Any],
        keep: int = 2,
        data: str = "",
        reading: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[SCORE],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._architecture, self._data = _jsonable(architecture), data
        self._settings = _jsonable(dict(settings or {}))
        self._orbax = ocp.training.Checkpointer(
            pathlib.Path(directory).resolve(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=not reading,
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in ascending order."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def best_step(self) -> int | None:
        """Step with the best score (ties: the newest); without any scores, the newest step."""
        scored = [c for c in self._orbax.checkpoints if c.metrics and SCORE in c.metrics]
        if scored:
            return max(scored, key=lambda c: (c.metrics[SCORE], c.step)).step
        return self.steps[-1] if self.steps else None

    def save(
        self, step: int, parts: dict[str, Any], dataset: Any = None, score: float | None = None
    ) -> None:
        """Writes a checkpoint and waits for completion, since later updates donate the arrays.

        Does nothing if the step already has a checkpoint.

        Args:
          step: number of finished steps.
          parts: trees of arrays, by name.
          dataset: grain iterator whose position is stored, or None. The position must be the same
            in every process.
          score: score that ranks checkpoints, or None; the best checkpoint is kept.
        """
        if step in self.steps:
            return
        items = {name: _flat(tree) for name, tree in parts.items()}
        names = {name: list(leaves) for name, leaves in items.items()}
        about = {"architecture": self._architecture, "parts": names, "data": self._data}
        about["settings"] = self._settings
        if dataset is not None:
            about["position"] = json.dumps(dataset.get_state())
        items[ABOUT] = about
        metrics = None if score is None else {SCORE: score}
        self._orbax.save_checkpointables(step, items, metrics=metrics)

    def restore(
        self, templates: dict[str, Any], dataset: Any = None, step: int | None = None
    ) -> dict[str, Any] | None:
        """Reads parts of a checkpoint into the structure and shardings of their templates.

        Args:
          templates: trees of `jax.ShapeDtypeStruct` for all or some of the saved parts.
          dataset: iterator to set to the stored position, or None.
          step: step of the checkpoint; the newest by default.

        Returns:
          The restored trees, or None if no checkpoint exists.

        Raises:
          ValueError: if the checkpoint belongs to another architecture, data set or program, or if
            its settings differ.
        """
        if not self.steps:
            return None
        step = self.steps[-1] if step is None else step
        flat = {name: _flat(tree) for name, tree in templates.items()}
        self._check(step, flat, compare_data=dataset is not None)
        if dataset is not None:
            dataset.set_state(self._position(step))
        loaded = self._orbax.load_checkpointables(step, flat)
        return {
            name: jax.tree.unflatten(
                jax.tree.structure(tree), [loaded[name][path] for path in flat[name]]
            )
            for name, tree in templates.items()
        }

    def check(self) -> None:
        """Checks that the newest checkpoint, if any, has this architecture, data and settings.

        Raises:
          ValueError: as `restore`.
        """
        if self.steps:
            self._check(self.steps[-1], {}, compare_data=True)

    def architecture(self, step: int) -> dict[str, Any]:
        """Returns the stored `ModelConfig.architecture()`."""
        return self._about(step)["architecture"]

    def _position(self, step: int) -> dict[str, Any]:
        about = self._about(step)
        if "position" not in about:
            raise ValueError(
                f"checkpoint {self._orbax.directory}/{step} lacks a position in the data; start "
                "a new run from its weights with --gin.configs.Experiment.init_from and another "
                "--workdir"
            )
        return json.loads(about["position"])

    def _about(self, step: int) -> dict[str, Any]:
        return self._orbax.load_checkpointables(step, {ABOUT: None})[ABOUT]

    def _check(self, step: int, flat: dict[str, dict[str, Any]], compare_data: bool) -> None:
        about = self._about(step)
        where = f"checkpoint {self._orbax.directory}/{step}"
        # Fields that older versions lacked behaved like today's defaults.
        stored = DEFAULTS | about["architecture"]
        differing = [
            f"{name} is {stored.get(name)!r} there and {self._architecture.get(name)!r} here"
            for name in sorted(about["architecture"].keys() | self._architecture.keys())
            if stored.get(name) != self._architecture.get(name)
        ]
        if differing:
            raise ValueError(
                f"{where} holds a different model: {'; '.join(differing)}. Use its configuration "
                "or another --workdir"
            )
        if compare_data and about["data"] != self._data:
            raise ValueError(
                f"{where} was trained on {about['data']} but the data is now {self._data}; use the "
                "original data, or start a new run with --gin.configs.Experiment.init_from and "
                "another --workdir"
            )
        if compare_data:
            stored = about.get("settings", {})  # older versions stored none
            differing = [
                f"{name} is {value!r} there and {self._settings[name]!r} here"
                for name, value in stored.items()
                if name in self._settings and self._settings[name] != value
            ]
            if differing:
                raise ValueError(
                    f"{where} is from a run with other settings: {'; '.join(differing)}. Change "
                    "them back, or start a new run with --gin.configs.Experiment.init_from and "
                    "another --workdir"
                )
            self._settings = stored | self._settings  # later checkpoints keep all of them
        for name, leaves in flat.items():
            differing = sorted(leaves.keys() ^ set(about["parts"].get(name, ())))
            if differing:
                raise ValueError(
                    f"{where} does not match this program: only one of them has "
                    f"{name}{differing[0]}. Another program or version wrote the checkpoint; use "
                    "another --workdir"
                )


def load_model(
    directory: str | pathlib.Path,
    architecture: dict[str, Any],
    template: Any,
    *,
    best: bool = False,
) -> Any:
    """Reads another run's model from its newest checkpoint, or from its best one if `best`.

    Args:
      directory: that run's checkpoint directory.
      architecture: `ModelConfig.architecture()` of the expected model.
      template: model with `jax.ShapeDtypeStruct` leaves.
      best: whether to read the checkpoint with the best score.

    Raises:
      ValueError: if no checkpoint exists, or if it holds another model.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; pass the checkpoints of a finished run")
    with Checkpointer(directory, architecture, reading=True) as checkpointer:
        step = checkpointer.best_step if best else None
        loaded = checkpointer.restore({"model": template}, step=step)
    if loaded is None:
        raise ValueError(f"{directory} contains no checkpoint; pass a finished run's directory")
    return loaded["model"]


def has_checkpoints(directory: str | pathlib.Path) -> bool:
    """Returns whether a directory contains a finished checkpoint, without opening any."""
    # Orbax names finished checkpoints by step, and adds a suffix to unfinished ones.
    directory = pathlib.Path(directory)
    return directory.is_dir() and any(path.name.isdecimal() for path in directory.iterdir())


def stored_architecture(directory: str | pathlib.Path) -> dict[str, Any]:
    """Returns the architecture in a run's newest checkpoint.

    `ModelConfig.from_architecture` turns it into a config.

    Raises:
      ValueError: if no checkpoint exists.
    """
    directory = pathlib.Path(directory)
    if directory.is_dir():
        with Checkpointer(directory, {}, reading=True) as checkpointer:
            if checkpointer.steps:
                return checkpointer.architecture(checkpointer.steps[-1])
    raise ValueError(f"{directory} contains no checkpoint; pass the working directory of a run")


def _flat(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _jsonable(fields: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(fields))
