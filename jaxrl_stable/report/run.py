"""Reads a run's records.

Files in a run's directory:

  metrics.jsonl   required; rows of the same step are merged, and later values win
  samples.jsonl   sampled responses, see `MetricsWriter.samples`
  config.gin      the resolved configuration, shown as text
  summary.json    an object. `name` is the title; `seconds` is the run time of the program; `gain`
                  is a paired difference in the held-out score (value, low, high; fractions), which
                  replaces the one derived from the metrics. Other entries are shown unchanged.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxrl_stable.files import read_json, read_jsonl

# Keys that `MetricsWriter` and the training loop add to every row of metrics. `time` is wall-clock
# time in seconds; the phases of a step have names that start with `time/`.
AXES = frozenset({"step", "time", "gradient_steps"})
# Placeholder for the layer at the end of a metric's name, as in routing/agreement_layer_XX.
LAYER = "XX"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as read from its directory.

    Attributes:
      name: title of the run.
      rows: metrics, one mapping per step, in order.
      samples: sampled responses, in order.
      summary: content of summary.json.
      config: text of config.gin.
    """

    name: str
    rows: list[dict]
    samples: list[dict]
    summary: dict
    config: str

    def metrics(self) -> set[str]:
        """Returns the names of the metrics that have at least one finite number."""
        return {k for row in self.rows for k, v in row.items() if is_number(v)} - AXES

    def layers(self, name: str) -> list[str]:
        """Returns [name] if the run has that metric; if it ends in `LAYER`, one name per layer."""
        if not name.endswith(LAYER):
            return [name] if name in self.metrics() else []
        stem = name.removesuffix(LAYER)
        ends = {m: m.removeprefix(stem) for m in self.metrics() if m.startswith(stem)}
        return sorted((m for m, end in ends.items() if end.isdigit()), key=lambda m: int(ends[m]))

    def series(self, name: str) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
        """Returns (gradient steps, values) of the rows that have `name`; null becomes NaN.

        Rows without `gradient_steps`, which come from the cold start, count as one step each.
        """
        rows = [row for row in self.rows if name in row]
        x = np.array([row.get("gradient_steps", row["step"]) for row in rows], float)
        y = np.array([row[name] if is_number(row[name]) else math.nan for row in rows], float)
        return x, y

    def last(self, name: str) -> int | float:
        """Returns the newest finite value, or NaN if none exists."""
        return next((r[name] for r in reversed(self.rows) if is_number(r.get(name))), math.nan)


def read_run(workdir: pathlib.Path) -> Run:
    """Reads a run from its directory.

    Raises:
      ValueError: if the directory or its metrics are missing, empty or damaged.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is not a directory; use the --workdir of a training run")
    metrics = workdir / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    if not rows:
        raise ValueError(f"{metrics}: missing or empty; train at least one step first")
    merged: dict[float, dict] = {}
    for row in rows:
        if not is_number(row.get("step")):
            raise ValueError(f"{metrics}: a row has no step; this is not a run's metrics file")
        merged.setdefault(row["step"], {}).update(row)
    samples, config = workdir / "samples.jsonl", workdir / "config.gin"
    summary = read_json(workdir / "summary.json")
    return Run(
        name=str(summary.get("name") or workdir.resolve().name),
        rows=[merged[step] for step in sorted(merged)],
        samples=read_jsonl(samples) if samples.exists() else [],
        summary=summary,
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
    )


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
