"""The files of a study, and checks that existing ones belong to it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxrl_stable import distributed
from jaxrl_stable.files import write_atomic
from jaxrl_stable.study.config import Study

# Fields that may change without invalidating existing runs.
OF_NO_RUN = frozenset(
    {"title", "grids", "figures", "seeds", "first_seed", "collapse", "show", "runs_at_a_time"}
    | {"cold_starts"}  # compared one by one, so that more can be added
)


def identify(study: Study, directory: pathlib.Path) -> None:
    """Compares the study with an existing study.json, then writes study.json.

    Fields that are missing in a study.json from an older version must have their default values.

    Raises:
      ValueError: if the directory holds a different study.
    """
    values = {
        field.name: getattr(study, field.name)
        for field in dataclasses.fields(study)
        if field.name not in OF_NO_RUN
    }
    values |= {f"cold_starts {start.name!r}": start for start in study.cold_starts}
    settings = {name: repr(value) for name, value in values.items()}
    path, old = directory / "study.json", {}
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        # LatentSizes was called LatentAttention in older versions.
        old = {name: text.replace("LatentAttention(", "LatentSizes(") for name, text in old.items()}
        for name, value in values.items():
            if name in old and old[name] not in (settings[name], _as_then(value, old[name])):
                raise ValueError(
                    f"{directory} holds a study with a different Study.{name}; use another "
                    f"--workdir or delete this one"
                )
    if not distributed.is_main():
        return
    about = {
        "title": study.title,
        "figures": dict(study.figures),
        "cells": {name: list(cell.figures) for name, cell in study.cells().items()},
        "collapse": dataclasses.asdict(study.collapse),
        "settings": old | settings,
    }
    write_atomic(path, json.dumps(about, indent=1) + "\n")


def _as_then(value: Any, recorded: str) -> str:
    """Returns a config's `repr` without fields that the record lacks and that have defaults."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    parts = [
        f"{field.name}={_as_then(getattr(value, field.name), recorded)}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default or re.search(rf"\b{field.name}=", recorded)
    ]
    return f"{type(value).__qualname__}({', '.join(parts)})"


def check_settings(study: Study, records: Iterable[dict[str, Any]]) -> None:
    """Checks that recorded cells still have the same settings; names omit the usual ones.

    Raises:
      ValueError: if a cell was run with different settings.
    """
    cells = study.cells()
    for record in records:
        cell = cells.get(record["cell"])
        if cell and record["settings"] != as_json(cell.settings | of_task(study)):
            raise ValueError(
                f"results.jsonl: cell {record['cell']!r} was run with other settings; use another "
                "--workdir"
            )


def check_starts(
    study: Study, scores: Mapping[str, np.ndarray], records: Iterable[dict[str, Any]]
) -> None:
    """Checks that new runs start from the same policy as recorded runs of the same seed.

    Otherwise cells could not be compared in pairs of runs with the same seed.

    Args:
      study: the study.
      scores: held-out scores of each cold start, one per seed.
      records: records of the finished runs.

    Raises:
      ValueError: if a cold start scores differently than before, because the code, the libraries
        or the machine changed.
    """
    for record in records:
        seed, start = record["seed"] - study.first_seed, record["settings"]["cold_start"]
        if start in scores and 0 <= seed < study.seeds:
            (score,) = rounded([scores[start][seed]])
            before = record["evaluations"]["score"][0]
            if score != before:
                raise ValueError(
                    f"cold start {start!r} of seed {record['seed']} scores {score}, but {before} "
                    "in results.jsonl, which another version or machine made; new runs cannot be "
                    "paired with its runs; use another --workdir"
                )


def of_task(study: Study) -> dict[str, str]:
    """Returns the entry that describes the task in the settings of every record."""
    return {"task": type(study.task).__name__}


def as_json(value: Any) -> Any:
    """Returns a value as it comes back from JSON; unknown types become strings."""
    return json.loads(json.dumps(value, default=str))


def rounded(values: Iterable[float | np.floating]) -> list[float | None]:
    """Rounds values to five significant digits; non-finite values become None."""
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in map(float, values)]


def append(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends records to a file, after removing a last line that a kill left incomplete."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        file.flush()
        os.fsync(file.fileno())
