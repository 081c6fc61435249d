"""Configuration of a study, bound by gin: a grid of cells, each run with several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxrl_stable.advantages import centered, check_group_size, conditions_of
from jaxrl_stable.array_tasks import ArrayTask
from jaxrl_stable.checks import field_types, one_of, positive, within
from jaxrl_stable.configs import FORMATS, Optimizer
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.objective import Objective, name_of
from jaxrl_stable.objectives import minirl

# MiniRL (arXiv:2512.01374, eq. 7). A setting that a record omits has its value from here.
PAPER: Mapping[str, Any] = {
    "loss": "minirl",
    "mini_batches": 1,
    "replay": "none",
    "clip": True,
    "clip_anchor": "old",
    "weight": "full",
    "truncation": 5.0,
    "policies": "all",
    "aggregation": "seq-mean-token-sum",
}
# How the names of cells spell settings that differ from the paper's.
SHORT = {
    ("clip", False): "no clip",
    ("weight", "none"): "no IS",
    ("weight", "mismatch"): "weight π_old/μ",
    ("policies", "recomputed"): "no train-infer IS",
    ("policies", "bypass"): "bypass",
    ("clip_anchor", "rollout"): "clip around μ",
    ("truncation", None): "no truncation",
    ("aggregation", "seq-mean-token-mean"): "length norm",
    ("aggregation", "token-mean"): "token mean",
}


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """Supervised training on a teacher's solutions, starting from random weights.

    Attributes:
      name: the name that a grid refers to.
      steps: gradient steps.
      batch_size: solutions per step.
      slips: probability that the teacher errs in a step (see `ArrayTask.solutions`); leaves room
        for RL to improve.
      task: the teacher's problems, in the study's vocabulary; None uses the study's task.
      optimizer: optimizer settings.
    """

    name: str = "default"
    steps: int = 400
    batch_size: int = 64
    slips: float = 0.2
    task: ArrayTask | None = None
    optimizer: Optimizer = Optimizer(learning_rate=3e-3, warmup_steps=20)

    def __post_init__(self):
        field_types(self)
        within(self, "steps", at_least=0)
        positive(self, "batch_size")
        within(self, "slips", at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
      figures: names of the figures that show the cell.
      objective: the objective, which includes loss, replay and N.
      options: keyword arguments bound to the loss.
      rollout_format: number format of the sampler's weights.
      cold_start: name of the cold start that the runs begin with.
      learning_rate: learning rate of the updates.
    """

    figures: tuple[str, ...]
    objective: Objective
    options: Mapping[str, Any]
    rollout_format: str
    cold_start: str
    learning_rate: float

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a record stores; all others have their values from `PAPER`."""
        estimator = name_of(self.objective.advantages)
        return {
            "loss": name_of(self.objective.loss),
            "mini_batches": self.objective.mini_batches,
            "replay": self.objective.replay,
            "policies": self.objective.policies,
            "aggregation": self.objective.aggregation,
            **self.options,
            **({} if estimator == "centered" else {"advantages": estimator}),
            "rollout_format": self.rollout_format,
            "cold_start": self.cold_start,
            "learning_rate": self.learning_rate,
        }


@dataclasses.dataclass(frozen=True)
class Grid:
    """All combinations of its fields' values, for one figure.

    Attributes:
      figure: name of the figure; with "" the cells appear in tables only.
      mini_batches, replay, losses, aggregations, policies, advantages: see `objective.Objective`.
      options: keyword arguments for the losses; each entry maps argument names to values.
      rollout_formats: see `configs.Reinforcement`.
      cold_starts: names of cold starts; () uses the study's first.
      learning_rates: learning rates of the updates; () uses the rate of the study's optimizer.
    """

    figure: str = ""
    mini_batches: tuple[int, ...] = (1,)
    replay: tuple[str, ...] = ("none",)
    losses: tuple[Callable, ...] = (minirl,)
    options: tuple[Mapping[str, Any], ...] = ({},)
    aggregations: tuple[str, ...] = ("seq-mean-token-sum",)
    policies: tuple[str, ...] = ("all",)
    advantages: tuple[Callable, ...] = (centered,)
    rollout_formats: tuple[str, ...] = ()
    cold_starts: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()

    def __post_init__(self):
        field_types(self)
        for rate in self.learning_rates:
            if not 0 <= rate < math.inf:
                raise ValueError(f"Grid.learning_rates has {rate}; use finite numbers, at least 0")

    def cells(self, study: Study) -> Iterable[Cell]:
        """Yields the combinations; the first fields vary slowest."""
        axes = (
            self.mini_batches,
            self.replay,
            self.losses,
            self.options,
            self.aggregations,
            self.policies,
            self.advantages,
            self.rollout_formats or (study.rollout_format,),
            self.cold_starts or (study.cold_starts[0].name,),
            self.learning_rates or (study.optimizer.learning_rate,),
        )
        for parts, replay, loss, options, *more, rollout, start, rate in itertools.product(*axes):
            aggregation, policies, advantages = more
            objective = Objective(
                mini_batches=parts,
                replay=replay,
                loss=partial(loss, **options) if options else loss,
                advantages=advantages,
                aggregation=aggregation,
                policies=policies,
                horizon=float(study.task.max_tokens),
            )
            options = getattr(objective.loss, "keywords", {})
            figures = (self.figure,) if self.figure else ()
            yield Cell(figures, objective, options, rollout, start, rate)


@dataclasses.dataclass(frozen=True)
class Collapse:
    """The rule that decides when a run has collapsed, fixed before anyone looks at the runs.

    A run collapses at a gradient step if one of these conditions holds at every recorded point for
    the next `for_steps` gradient steps (or until the end of the record, if that comes first and the
    stretch has at least two points). The first such step counts.

    - Score: the running mean of the held-out score or of the training reward is below `score_share`
      of its highest value so far *and* more than `margin` below that value.
    - KL: the KL between sampler and trainer is above `kl_limit`.
    - Finiteness: one of these quantities is non-finite after having been finite.

    The highest value so far includes the score of the cold start, so a run that loses only what it
    gained from the cold start also collapses. `margin` filters out noise: a policy that scores 0.1
    once and 0.04 later on 64 problems has not collapsed. A run has *not learned* if it does not
    collapse and its running mean over a quarter of its evaluations never rises by `gain` above its
    initial score. Such a run is censored, like a stable one, because it had nothing to lose.

    Attributes:
      score_share: lower limit of the score, as a share of its running peak.
      margin: smallest fall that counts, in score units.
      gain: smallest rise that counts as learning, in score units.
      kl_limit: upper limit of the KL (k3), in nats per token. Stable runs in arXiv:2512.01374 stay
        near 0.01.
      for_steps: how long a condition must hold, in gradient steps.
    """

    score_share: float = 0.5
    margin: float = 0.1
    gain: float = 0.05
    kl_limit: float = 0.5
    for_steps: int | float = 32

    def __post_init__(self):
        field_types(self)
        within(self, "score_share", at_least=0, at_most=1)
        within(self, "margin", "gain", "kl_limit", "for_steps", at_least=0)


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs of every cell of the grids with every seed.

    A run is a cold start followed by reinforcement learning. For a given seed, all cells begin with
    the same policy and draw the same problems and random numbers, so they can be compared in pairs.
    Every run makes the same number of gradient steps on mini-batches of the same size: with N
    mini-batches per rollout, a rollout has N times as many prompts, and a run has 1/N as many
    rollouts (arXiv:2512.01374, §4.2).

    Attributes:
      title: title of the report.
      task: the task, which supplies problems and rewards.
      model: configuration of the policy; its vocabulary size is derived from the task.
      cold_starts: the cold starts that grids can name.
      grids: the cells to run.
      figures: titles of the figures, by name.
      seeds: runs per cell.
      first_seed: the first seed; the others follow it.
      prompts: prompts per mini-batch.
      group_size: responses per prompt; at least 2 if the group is a cell's baseline.
      gradient_steps: gradient steps per run.
      evaluations: evenly spaced evaluations per run, not counting the one before the first step.
      heldout_problems, heldout_samples: problems per evaluation and responses per problem, sampled
        from the unquantised training policy.
      temperature: temperature of all sampling.
      rollout_format: format for grids that do not set one.
      optimizer: optimizer of the updates.
      runs_at_a_time: largest number of runs in one program; they share its memory.
      collapse: the rule that decides when a run has collapsed.
      show: names of the cells whose first seed contributes samples to the report.
    """

    title: str = "A study"
    task: ArrayTask | None = None
    model: ModelConfig | None = None
    cold_starts: tuple[ColdStart, ...] = (ColdStart(),)
    grids: tuple[Grid, ...] = ()
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: int = 5
    first_seed: int = 0
    prompts: int = 8
    group_size: int = 8
    gradient_steps: int = 256
    evaluations: int = 32
    heldout_problems: int = 64
    heldout_samples: int = 1
    temperature: float = 1.0
    rollout_format: str = "fp8"
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_steps=8)
    runs_at_a_time: int = 32
    collapse: Collapse = Collapse()
    show: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("task", "model"):
            if getattr(self, field) is None:
                raise ValueError(f"Study.{field} is missing; bind it")
        if not self.grids or not self.cold_starts:
            raise ValueError("Study.grids and Study.cold_starts need at least one entry each")
        field_types(self)
        positive(self, "seeds", "prompts", "group_size", "gradient_steps", "evaluations")
        positive(self, "heldout_problems", "heldout_samples", "runs_at_a_time")
        within(self, "first_seed", at_least=0)
        within(self, "temperature", above=0)
        if self.gradient_steps % self.evaluations:
            raise ValueError(
                f"Study.gradient_steps ({self.gradient_steps}) must be a multiple of evaluations "
                f"({self.evaluations})"
            )
        one_of(self, "rollout_format", FORMATS)
        names = [start.name for start in self.cold_starts]
        if len(set(names)) < len(names):
            raise ValueError(f"Study.cold_starts has the names {names}; make them unique")
        tasks = [self.task, *(start.task for start in self.cold_starts if start.task)]
        for task in tasks:
            if any(a != b for a, b in zip(task.texts, self.task.texts)):
                raise ValueError(
                    f"ColdStart.task has the vocabulary {task.texts}, but Study.task has "
                    f"{self.task.texts}; use a task of the same kind"
                )
        vocabulary = max(task.vocab_size for task in tasks)
        model = dataclasses.replace(self.model, vocab_size=vocabulary)
        object.__setattr__(self, "model", model)
        for cell in self.cells().values():
            if self.interval % cell.objective.mini_batches:
                raise ValueError(
                    f"Study: {self.interval} gradient steps between evaluations are not a multiple "
                    f"of N = {cell.objective.mini_batches}; change gradient_steps or evaluations"
                )
            if cell.cold_start not in names:
                raise ValueError(
                    f"Grid.cold_starts has {cell.cold_start!r}, which is not in "
                    f"Study.cold_starts; use one of {names}"
                )
            if cell.rollout_format not in FORMATS:
                raise ValueError(
                    f"Grid.rollout_formats has {cell.rollout_format!r}; use one of {FORMATS}"
                )
            estimator = cell.objective.advantages
            check_group_size(estimator, self.group_size, "Study.group_size")
            conditions = conditions_of(estimator)
            if conditions.outside(np.array([0.0, 1.0])).any():
                raise ValueError(
                    f"Grid.advantages: {name_of(estimator)} needs rewards of {conditions.bounds}, "
                    f"but array tasks return 0 to 1; use {conditions.instead}"
                )
        for name in self.show:
            if name not in self.cells():
                raise ValueError(f"Study.show has {name!r}; use some of {list(self.cells())}")

    @property
    def interval(self) -> int:
        """Gradient steps from one evaluation to the next."""
        return self.gradient_steps // self.evaluations

    def cells(self) -> dict[str, Cell]:
        """Returns the cells by name, in grid order; a cell in several figures appears once."""
        merged: dict[str, Cell] = {}
        for cell in itertools.chain.from_iterable(grid.cells(self) for grid in self.grids):
            usual = PAPER if cell.settings["loss"] == "minirl" else {}
            key = json.dumps({**usual, **cell.settings}, sort_keys=True, default=str)
            seen = merged.get(key)
            figures = (*(seen.figures if seen else ()), *cell.figures)
            figures = tuple(dict.fromkeys(figures))
            merged[key] = dataclasses.replace(seen or cell, figures=figures)
        named = {self.name(cell): cell for cell in merged.values()}
        if len(named) < len(merged):
            raise ValueError(
                "Study.grids: two different cells have the same name; change their options"
            )
        return named

    def name(self, cell: Cell) -> str:
        """Returns a short name: how the cell differs from MiniRL with the study's settings."""
        settings, parts = cell.settings, []
        parts.append(f"N={settings.pop('mini_batches')}")
        loss, replay = settings.pop("loss"), settings.pop("replay")
        parts += [loss] * (loss != "minirl") + [replay] * (replay != "none")
        usual = {
            **PAPER,
            "rollout_format": self.rollout_format,
            "cold_start": self.cold_starts[0].name,
            "learning_rate": self.optimizer.learning_rate,
        }
        for key, value in settings.items():
            if key in usual and usual[key] == value:
                continue
            bare = key in ("rollout_format", "cold_start", "advantages")
            plain = value if bare else f"{key} {value}"
            parts.append(SHORT.get((key, value), plain) if _hashable(value) else str(plain))
        return ", ".join(map(str, parts))


def _hashable(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)
