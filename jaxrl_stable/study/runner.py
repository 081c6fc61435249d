"""Runs a study: cells that share a program run together, and finished runs are never repeated."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from jaxrl_stable import distributed
from jaxrl_stable.files import read_jsonl
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.run.lock import locked
from jaxrl_stable.study.choice import program_of
from jaxrl_stable.study.config import Cell, ColdStart, Study
from jaxrl_stable.study.programs import compiled, made_ahead, over_runs, scoring
from jaxrl_stable.study.records import (
    append,
    as_json,
    check_settings,
    check_starts,
    identify,
    of_task,
    rounded,
)
from jaxrl_stable.study.runs import RunState, begin, cold_start
from jaxrl_stable.study.samples import sample_rows


class Member(NamedTuple):
    """One run: a cell and a seed."""

    cell: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Wave:
    """Runs that one program executes together.

    Attributes:
      members: the runs.
      cells: names of all cells that the program can run.
      size: number of runs after padding; a multiple of the number of devices, and equal for all
        waves of a program.
    """

    members: tuple[Member, ...]
    cells: tuple[str, ...]
    size: int

    @property
    def padded(self) -> tuple[Member, ...]:
        """The runs, with the last one repeated up to `size`."""
        return self.members + self.members[-1:] * (self.size - len(self.members))


def plan(
    study: Study, cells: dict[str, Cell], done: Iterable[Member], devices: int
) -> list[list[Wave]]:
    """Returns the waves of unfinished runs: one list per program, of waves of equal size."""
    done = set(done)
    programs: dict[tuple, list[str]] = {}
    for name, cell in cells.items():
        key = (*program_of(cell.objective), cell.rollout_format)
        programs.setdefault(key, []).append(name)
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    plans = []
    for names in programs.values():
        runs = [Member(name, seed) for name in names for seed in seeds]
        runs = [run for run in runs if run not in done]
        if not runs:
            continue
        count = math.ceil(len(runs) / study.runs_at_a_time)
        size = math.ceil(math.ceil(len(runs) / count) / devices) * devices
        shared = tuple(names), size
        plans.append([Wave(tuple(runs[i : i + size]), *shared) for i in range(0, len(runs), size)])
    return plans


def run_study(study: Study, directory: str | os.PathLike, show_progress: bool = True) -> None:
    """Executes the runs missing in `directory`, and appends records as each wave finishes.

    Runs are spread over all JAX devices. A CPU counts as one device, unless
    `jax.config.update("jax_num_cpu_devices", os.cpu_count())` is called first.

    Args:
      study: the study to run.
      directory: where results.jsonl, samples.jsonl and study.json are stored.
      show_progress: whether to print the current program and the remaining time.

    Raises:
      ValueError: if the directory holds a different study, if another process runs a study in it,
        or if new cold starts differ from the recorded ones.
    """
    with locked(directory):
        _run_missing(study, pathlib.Path(directory), show_progress)


def _run_missing(study: Study, directory: pathlib.Path, show_progress: bool) -> None:
    identify(study, directory)
    results = directory / "results.jsonl"
    records = read_jsonl(results) if results.exists() else []
    cells, devices = study.cells(), jax.devices()
    check_settings(study, records)
    distributed.check_same(
        "study or its results",
        f"{[c.settings for c in cells.values()]} {study.seeds} {len(records)}",
    )
    plans = plan(study, cells, (Member(r["cell"], r["seed"]) for r in records), len(devices))
    members = [m for waves in plans for wave in waves for m in wave.members]
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    show_progress = show_progress and distributed.is_main()
    score = scoring(study, devices)
    makers = [
        partial(compiled, study, [cells[name] for name in waves[0].cells], waves[0].size, devices)
        for waves in plans
    ]
    with (
        made_ahead(makers) as programs,
        Progress(*columns, disable=not show_progress) as progress,
    ):
        say = progress.print if show_progress else lambda *_, **__: None
        bar = progress.add_task("cold starts", total=len(members) * study.evaluations)
        begin_time = time.perf_counter()
        missing = {
            cells[m.cell].cold_start for waves in plans for wave in waves for m in wave.members
        }
        starts = make_starts(study, devices, missing, score)
        for name, start in starts.items():
            say(f"cold start {name}: score {start.scores.mean():.3f}")
        check_starts(study, {name: start.scores for name, start in starts.items()}, records)
        if starts:
            say(f"{time.perf_counter() - begin_time:.0f} s for cold starts")
        for number, waves in enumerate(plans, start=1):
            what = f"program {number} of {len(plans)}: {', '.join(waves[0].cells)}"
            progress.update(bar, description=what[: progress.console.width - 20])
            program, seconds = next(programs)
            say(f"{what}: compiled in {seconds:.0f} s", soft_wrap=True)
            for wave in waves:
                runs = begin_runs(study, cells, wave, starts, devices)
                tick = partial(progress.advance, bar, len(wave.members))
                runs, finished = run_wave(study, cells, wave, runs, (program, score), starts, tick)
                if distributed.is_main():
                    append(results, finished)
                samples = shown(study, cells, wave, runs)
                if distributed.is_main():
                    append(directory / "samples.jsonl", samples)
                seconds = finished[0]["seconds"]
                say(f"  {len(finished)} runs, {seconds:.1f} s each")


class Start(NamedTuple):
    """One cold start, run with every seed.

    Attributes:
      models: the policies, stacked over seeds.
      scores: held-out score of each seed.
    """

    models: Transformer
    scores: Float[np.ndarray, "seeds"]


def make_starts(
    study: Study, devices: list[jax.Device], names: Collection[str], score: Callable
) -> dict[str, Start]:
    """Returns the cold starts with these names, scored by `score` (see `scoring`)."""
    keys = [jax.random.fold_in(key, 0) for key in seed_keys(study)]
    padded = jnp.stack(keys + keys[-1:] * (-len(keys) % len(devices)))
    starts = {}
    for config in study.cold_starts:
        if config.name not in names:
            continue

        def start(key: Key[Array, ""], _: None, config: ColdStart = config) -> Transformer:
            return cold_start(config, study, key)

        models = over_runs(start, devices)(padded, None)
        scores = distributed.replicated(score(models, None))[: study.seeds]
        starts[config.name] = Start(models, scores)
    return starts


def seed_keys(study: Study) -> list[Key[Array, ""]]:
    """Returns one key per seed; 0 is folded in for the cold start, 1 for reinforcement learning."""
    return [jax.random.key(study.first_seed + i) for i in range(study.seeds)]


def begin_runs(
    study: Study,
    cells: dict[str, Cell],
    wave: Wave,
    starts: dict[str, Start],
    devices: list[jax.Device],
) -> RunState:
    """Returns the stacked runs of a wave, before their first step."""
    members = wave.padded
    names = list(starts)
    of = np.array([names.index(cells[m.cell].cold_start) for m in members])
    seed = np.array([m.seed - study.first_seed for m in members])
    keys = jnp.stack([jax.random.fold_in(key, 1) for key in seed_keys(study)])
    objective = np.array([wave.cells.index(m.cell) for m in members], np.int32)
    rate = np.array([cells[m.cell].learning_rate for m in members], np.float32)

    def choose(*models: Transformer) -> Transformer:
        return jax.tree.map(lambda *x: jnp.stack(x)[of, seed], *models)

    models = jax.jit(choose)(*(start.models for start in starts.values()))
    first = partial(_first, study)
    return over_runs(first, devices)((models, keys[seed], objective, rate), None)


def _first(study: Study, own: tuple, _: None) -> RunState:
    return begin(study, *own)


def run_wave(
    study: Study,
    cells: dict[str, Cell],
    wave: Wave,
    runs: RunState,
    programs: tuple[Callable, Callable],
    starts: dict[str, Start],
    tick: Callable[[], None],
) -> tuple[RunState, list[dict[str, Any]]]:
    """Executes all steps of a wave with its two programs, `advance` and `scoring`.

    Returns:
      The runs after their last step, and their records.
    """
    step, score = programs
    scores, curves, first = [], [], {}
    begin_time = time.perf_counter()
    parts = cells[wave.cells[0]].objective.mini_batches
    rollouts = study.interval // parts
    for interval in range(study.evaluations):
        runs, measured = step(runs, jnp.int32(interval * rollouts))
        measured, reached = distributed.replicated((measured, score(runs.state.model, None)))
        if interval == 0:
            first = {name: x[:, :2] for name, x in measured.items()}
        curves.append({name: x.mean(-1) for name, x in measured.items()})
        scores.append(reached)
        tick()
    seconds = (time.perf_counter() - begin_time) / len(wave.members)
    steps = np.arange(study.evaluations + 1) * study.interval
    records = []
    for i, member in enumerate(wave.members):
        cell = cells[member.cell]
        before = starts[cell.cold_start].scores[member.seed - study.first_seed]
        records.append(
            {
                "cell": member.cell,
                "figure": list(cell.figures),
                "seed": member.seed,
                "settings": as_json(cell.settings | of_task(study)),
                "curves": {
                    "gradient_steps": steps[1:].tolist(),
                    **{name: rounded(c[name][i] for c in curves) for name in curves[0]},
                },
                "evaluations": {
                    "gradient_steps": steps.tolist(),
                    "score": rounded([before, *(reached[i] for reached in scores)]),
                },
                "first": {name: rounded(x[i]) for name, x in first.items()},
                "seconds": round(seconds, 3),
            }
        )
    return runs, records


def shown(study: Study, cells: dict[str, Cell], wave: Wave, runs: RunState) -> list[dict[str, Any]]:
    """Returns samples from the first seed of each cell in `Study.show`."""
    rows = []
    for i, member in enumerate(wave.members):
        if member.cell in study.show and member.seed == study.first_seed:
            state = distributed.replicated(jax.tree.map(lambda x, i=i: x[i], runs.state))
            about = dict(cell=member.cell, step=study.gradient_steps)
            key = jax.random.fold_in(jax.random.key(member.seed), 2)
            rows += sample_rows(study, cells[member.cell], state, key, about)
    return rows
