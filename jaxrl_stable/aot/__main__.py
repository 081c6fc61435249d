"""Compiles the programs of a run for a TPU slice, on a machine without TPUs.

    python -m jaxrl_stable.aot --gin_file=experiments/qwen3_30b_a3b/paper.gin --topology=v5p:4x4x4
    python -m jaxrl_stable.aot --gin_file=… --topology=v5e:16x16*2 --programs=update --json=out.json
    python -m jaxrl_stable.aot --gin_file=… --sweep=v5p:4x4x4,v5p:4x4x8,v5p:4x8x8,v5p:8x8x8

Needs the extra `tpu`. If a program does not fit, prints one line and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from fractions import Fraction

import jax

from jaxrl_stable.aot import programs
from jaxrl_stable.aot.analysis import Figures, analyse, step_seconds
from jaxrl_stable.aot.report import details, refusal, table
from jaxrl_stable.aot.sweep import plot_sweep, scaled, sweep_record, sweep_table, topology_record
from jaxrl_stable.aot.topology import Topology, parse_topology
from jaxrl_stable.configs import Experiment
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.program import GIN_PREFIX, errors_in_one_line
from jaxrl_stable.sharding import make_mesh
from jaxrl_stable.text import OneLineParser, byte_size, duration


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the options; `--gin.NAME=VALUE` binds a value, as in every program."""
    parser = OneLineParser(
        prog="python -m jaxrl_stable.aot",
        description="Compiles the programs of a run for a TPU slice, on a machine without TPUs.",
        epilog=f"{GIN_PREFIX}NAME=VALUE binds a value, as in jaxrl_stable.train.",
    )
    parser.add_argument("--gin_file", action="append", default=[], help="gin file; may be repeated")
    parser.add_argument("--topology", help="slice, such as v5p:4x4x4; v5e:16x16*2 is two slices")
    parser.add_argument(
        "--sweep", help="comma-separated topologies, smallest first, for weak scaling"
    )
    parser.add_argument(
        "--programs", default=",".join(programs.NAMES), help="comma-separated; default: %(default)s"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write all figures to")
    parser.add_argument("--plot", type=pathlib.Path, help="plot of a sweep (PNG, PDF or SVG)")
    parser.add_argument("--hlo", type=pathlib.Path, help="directory for the compiled programs")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    gin = [each for each in arguments if each.startswith(GIN_PREFIX)]
    options = parser.parse_args([each for each in arguments if not each.startswith(GIN_PREFIX)])
    options.bindings = [each.removeprefix(GIN_PREFIX) for each in gin]
    options.programs = tuple(filter(None, options.programs.split(",")))
    return options


def compile_and_measure(
    experiment: Experiment,
    topology: Topology,
    names: tuple[str, ...],
    hlo: pathlib.Path | None = None,
) -> list[Figures]:
    """Compiles the programs of a step and returns their figures.

    Raises:
      ValueError: if the mesh does not fit the topology.
    """
    mesh = make_mesh(experiment.mesh, topology.devices())
    experiment.check_mesh(mesh)
    figures = []
    with jax.set_mesh(mesh):
        for compiled in programs.compiled_programs(programs.for_tpu(experiment), mesh, names):
            if hlo is not None:
                hlo.mkdir(parents=True, exist_ok=True)
                text = compiled.executable.as_text()
                (hlo / f"{compiled.program.name}.hlo").write_text(text)
            figures.append(analyse(compiled, experiment.model, topology, mesh))
    return figures


def main(options: argparse.Namespace) -> None:
    experiment = load_experiment(options.gin_file, options.bindings)
    if options.sweep:
        sweep(experiment, options)
    elif options.topology:
        one(experiment, options)
    else:
        raise ValueError("--topology is missing; pass, for example, --topology=v5p:4x4x4")


def one(experiment: Experiment, options: argparse.Namespace) -> None:
    """Compiles the programs for one topology and prints all figures."""
    topology = parse_topology(options.topology)
    figures = compile_and_measure(experiment, topology, options.programs, options.hlo)
    seconds = step_seconds(figures, experiment.reinforcement)
    print(
        f"{topology.name}: {topology.chips} chips of {byte_size(topology.chip.hbm)}, "
        f"{experiment.mesh}"
    )
    print(table(figures), details(figures), sep="\n\n")
    shares = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    print(f"\none step at the roofline: {duration(sum(seconds.values()))} ({shares})")
    if options.json:
        record = topology_record(topology, figures) | {"step_seconds": seconds}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    refuse_unless_fitting(figures)


def sweep(experiment: Experiment, options: argparse.Namespace) -> None:
    """Compiles the programs for several slices and prints how the cost per chip grows."""
    topologies = [parse_topology(name) for name in options.sweep.split(",")]
    sizes = []
    for topology in topologies:
        larger = scaled(experiment, Fraction(topology.chips, topologies[0].chips))
        sizes.append((topology, compile_and_measure(larger, topology, options.programs)))
        print(f"{topology.name}: compiled", file=sys.stderr)
    print(sweep_table(sizes))
    if options.json:
        options.json.write_text(json.dumps(sweep_record(sizes), indent=2) + "\n")
    if options.plot:
        plot_sweep(sizes, options.plot)
    refuse_unless_fitting([each for _, figures in sizes for each in figures])


def refuse_unless_fitting(figures: list[Figures]) -> None:
    """Checks that all programs fit; otherwise raises a ValueError that says what to change."""
    for each in figures:
        if not each.fits:
            raise ValueError(refusal(each))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    options = parse(sys.argv[1:])
    with errors_in_one_line(options.debug):
        main(options)
