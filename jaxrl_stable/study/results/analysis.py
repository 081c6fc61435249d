"""The results of the runs of a study: curves over seeds, collapse, one outcome per run.

A record describes one finished run (a line of results.jsonl):

    {"cell": name, "figure": [ids], "seed": 0, "settings": {...},
     "curves": {"gradient_steps": [...], name: [...]},
     "evaluations": {"gradient_steps": [...], "score": [...]}, "seconds": 12.3}

Values that are not finite are null in the file and NaN here. Everything is computed with NumPy.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from jaxrl_stable.statistics import bootstrap_band, smooth
from jaxrl_stable.study.config import Collapse

Points = Float[np.ndarray, "points"]
Record = Mapping[str, Any]

# The share of the recorded points, counted from the end, that defines what a run "ends at".
LAST = 0.25
# Points per running mean of evaluations: they are few, and each is a mean over many problems.
EVALUATION_WIDTH = 3
# A smaller KL is rounding error of float32 log-probabilities, and its logarithm is meaningless.
KL_FLOOR = 1e-9


@dataclasses.dataclass(frozen=True)
class CellRuns:
    """Runs with the same settings, one per seed, in the order of the seeds."""

    name: str
    settings: Mapping[str, Any]
    figures: tuple[str, ...]
    runs: tuple[Record, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one run.

    Attributes:
      seed: seed of the run.
      final: mean of the last quarter of its evaluations.
      peak: highest held-out score under a running mean of three evaluations.
      area: mean held-out score over the run's gradient steps (area under the curve / steps).
      reward: mean training reward of the last quarter of the run.
      kl: log10 of the geometric mean of the mismatch KL over the run (nats per token).
      entropy: mean entropy of the last quarter of the run, nats.
      end: last recorded gradient step.
      time: gradient step of the collapse, or `end` without one (censored).
      cause: "score", "reward" or "KL", whichever came first; "" without a collapse.
      learned: whether the score rose by the rule's gain above its start.
      seconds: wall time; runs that share a program divide it equally.
    """

    seed: int
    final: float
    peak: float
    area: float
    reward: float
    kl: float
    entropy: float
    end: float
    time: float
    cause: str
    learned: bool
    seconds: float

    @property
    def collapsed(self) -> bool:
        return bool(self.cause)

    @property
    def state(self) -> str:
        return "collapsed" if self.cause else "stable" if self.learned else "not learned"


def cells_of(records: Iterable[Record]) -> list[CellRuns]:
    """Groups runs by cell, in the order in which the cells first appear.

    Raises:
      ValueError: if a record lacks a field, a cell has a seed twice, or two records of one cell
        have different settings.
    """
    groups: dict[str, list[Record]] = {}
    for number, record in enumerate(records, 1):
        missing = {"cell", "seed", "settings", "curves", "evaluations"} - set(record)
        if missing:
            raise ValueError(
                f"results.jsonl, record {number}: no {', '.join(sorted(missing))}; run it again"
            )
        groups.setdefault(str(record["cell"]), []).append(record)
    found = []
    for name, runs in groups.items():
        runs = sorted(runs, key=lambda run: run["seed"])
        for one, other in itertools.pairwise(runs):
            if one["seed"] == other["seed"]:
                raise ValueError(
                    f"results.jsonl: cell {name!r} has seed {one['seed']} twice; delete one line"
                )
            if one["settings"] != other["settings"]:
                raise ValueError(
                    f"results.jsonl: cell {name!r} has runs of different settings; rename one"
                )
        figures = dict.fromkeys(f for run in runs for f in run.get("figure") or ())
        found.append(CellRuns(name, runs[0]["settings"], tuple(figures), tuple(runs)))
    return found


def curve(run: Record, name: str) -> tuple[Points, Points]:
    """Returns gradient steps and values of a curve; both are empty if it was not recorded.

    The curve "score" is the held-out score.

    Raises:
      ValueError: if there are not as many values as steps.
    """
    table = run["evaluations" if name == "score" else "curves"]
    if table.get(name) is None:
        return np.empty(0), np.empty(0)
    x, y = (
        np.array([math.nan if v is None else v for v in table.get(key) or ()], np.float64)
        for key in ("gradient_steps", name)
    )
    if len(x) != len(y):
        raise ValueError(
            f"results.jsonl: cell {run['cell']!r}, seed {run['seed']}: {len(y)} values of {name} at"
            f" {len(x)} gradient steps; run it again"
        )
    return x, y


def aligned(
    runs: Sequence[Record], name: str, smoothed: bool = False
) -> tuple[Points, Float[np.ndarray, "runs points"]]:
    """Aligns curves of several runs on the union of their gradient steps; gaps are NaN."""
    curves = [curve(run, name) for run in runs]
    steps = np.unique(np.concatenate([x for x, _ in curves] or [np.empty(0)]))
    values = np.full((len(curves), len(steps)), np.nan)
    for row, (x, y) in zip(values, curves):
        row[np.searchsorted(steps, x)] = smooth(y) if smoothed else y
    return steps, values


def band(cell: CellRuns, name: str) -> tuple[Points, Points, Points, Points]:
    """Returns gradient steps, mean over seeds, and the ends of its band, for a curve of a cell.

    Curves other than the held-out score are smoothed by a running mean. For the KL, which spans
    decades, mean and band are geometric.
    """
    x, values = aligned(cell.runs, name, smoothed=name != "score")
    if name == "kl":
        return x, *(np.exp(y) for y in bootstrap_band(np.log(np.maximum(values, KL_FLOOR))))
    return x, *bootstrap_band(values)


def outcome(run: Record, rule: Collapse) -> Outcome:
    """Returns the outcome of a run; an evaluation that is not finite counts as a score of 0."""
    steps, score = curve(run, "score")
    score = np.nan_to_num(score, nan=0.0)
    peak = smooth(score, EVALUATION_WIDTH)
    reward, kl, entropy = (curve(run, name)[1] for name in ("reward", "kl", "entropy"))
    kl = kl[np.isfinite(kl)]
    time, cause = collapse(run, rule)
    ends = [x[-1] for x in (steps, curve(run, "reward")[0], curve(run, "kl")[0]) if len(x)]
    end = float(max(ends, default=0.0))
    # A wide mean: without any learning, the highest of many noisy evaluations is above the start.
    level = score if len(score) else np.nan_to_num(reward, nan=0.0)
    wide = smooth(level, math.ceil(LAST * len(level)) | 1)
    start = smooth(level, EVALUATION_WIDTH)[:1]
    return Outcome(
        seed=run["seed"],
        final=last_mean(score),
        peak=float(peak.max()) if len(peak) else math.nan,
        area=_area(steps, score),
        reward=last_mean(reward),
        kl=float(np.log10(np.maximum(kl, KL_FLOOR)).mean()) if len(kl) else math.nan,
        entropy=last_mean(entropy),
        end=end,
        time=min(time, end),
        cause=cause,
        learned=bool(len(level) and wide.max() - start[0] >= rule.gain),
        seconds=float(run.get("seconds") or math.nan),
    )


def outcomes_of(cells: Iterable[CellRuns], rule: Collapse) -> dict[str, list[Outcome]]:
    """Returns the outcomes of each cell's runs, by the cell's name."""
    return {cell.name: [outcome(run, rule) for run in cell.runs] for cell in cells}


def collapse(run: Record, rule: Collapse) -> tuple[float, str]:
    """Returns gradient step and cause of a run's first collapse; (∞, "") without one."""
    (score_steps, score), (reward_steps, reward), (kl_steps, kl) = (
        curve(run, name) for name in ("score", "reward", "kl")
    )
    signals = {
        "score": (score_steps, _fallen(smooth(score, EVALUATION_WIDTH), rule) | _lost(score)),
        "reward": (reward_steps, _fallen(smooth(reward), rule) | _lost(reward)),
        "KL": (kl_steps, (kl > rule.kl_limit) | _lost(kl)),
    }
    times = {name: first_lasting(*signal, rule.for_steps) for name, signal in signals.items()}
    cause = min(times, key=times.__getitem__)
    return (times[cause], cause) if math.isfinite(times[cause]) else (math.inf, "")


def first_lasting(
    x: Points, bad: Bool[np.ndarray, "points"] | Shaped[np.ndarray, "0"], for_steps: int | float
) -> float:
    """Returns the first x from which `bad` lasts `for_steps`, or to the end (two points), or ∞."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], bad, [False])).astype(int)))
    for start, end in edges.reshape(-1, 2):
        if end - start >= 2 and (x[end - 1] - x[start] >= for_steps or end == len(x)):
            return float(x[start])
    return math.inf


def last_mean(y: Points) -> float:
    """Returns the mean of the finite values in the last quarter of the points; NaN without any."""
    tail = y[len(y) - math.ceil(LAST * len(y)) :]
    tail = tail[np.isfinite(tail)]
    return float(tail.mean()) if len(tail) else math.nan


def _fallen(y: Points, rule: Collapse) -> Bool[np.ndarray, "points"]:
    """Marks where a score is far below its running peak."""
    peak = np.fmax.accumulate(y)
    return (y < rule.score_share * peak) & (peak - y > rule.margin)


def _lost(y: Points) -> Bool[np.ndarray, "points"]:
    finite = np.isfinite(y)
    return ~finite & np.logical_or.accumulate(finite)


def _area(x: Points, y: Points) -> float:
    if len(x) < 2:
        return float(y.mean()) if len(y) else math.nan
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))
