"""Runs every cell of a grid with several seeds, and writes the report.

    python -m jaxrl_stable.study --gin_file=experiments/paper/smoke.gin

Run the same command again to continue where it stopped. Added cells or seeds extend the existing
results; if nothing is left to run, only the report is written again.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax

from jaxrl_stable import distributed, gin_files, program
from jaxrl_stable.study.config import Study
from jaxrl_stable.study.results.evidence import write_evidence
from jaxrl_stable.study.results.markdown import write_claims
from jaxrl_stable.study.results.page import read_records, write_figure, write_page
from jaxrl_stable.study.runner import run_study


def build() -> Study:
    """Builds the study from the parsed gin configuration."""
    study = gin_files.configured(Study)()
    grids = tuple(
        dataclasses.replace(
            grid,
            losses=tuple(map(gin_files.settled, grid.losses)),
            advantages=tuple(map(gin_files.settled, grid.advantages)),
        )
        for grid in study.grids
    )
    settled = dataclasses.replace(study, grids=grids)
    for cell in settled.cells().values():
        cell.objective.check_options()
    for cell in study.cells().values():
        cell.objective.check()  # through gin, which records the bindings that the functions read
    return settled


def describe(study: Study) -> str:
    """Returns the output of a dry run: the number of runs, and the cells."""
    cells = study.cells()
    runs = len(cells) * study.seeds
    return "\n".join([f"{len(cells)} cells × {study.seeds} seeds = {runs} runs", *cells])


def default_workdir(files: Sequence[str]) -> str | None:
    """Returns runs/NAME, where NAME is the name of the last gin file."""
    return os.path.join("runs", pathlib.Path(files[-1]).stem) if files else None


def main(study: Study, workdir: str) -> None:
    """Runs the study and writes its report."""
    run_study(study, workdir)
    if distributed.is_main():
        directory = pathlib.Path(workdir)
        records = read_records(directory)
        write_evidence(directory, records, study)
        write_claims(directory, records, study.collapse)
        for figure in sorted({name for record in records for name in record["figure"]}):
            title = study.figures.get(figure, figure)
            write_figure(records, figure, directory / f"{figure}.png", title)
        print(f"report: {write_page(directory)}")


if __name__ == "__main__":
    if jax.config.jax_num_cpu_devices == -1:  # on a CPU, each core executes its own runs
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    program.run(main, program.Kind(build, describe, default_workdir))
