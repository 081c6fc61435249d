"""Runs of a study side by side against the same runs one after another.

    python experiments/bench/study_speed.py [--runs=10] [--devices=2] [--rounds=4]
    python experiments/bench/study_speed.py --whole

Claim: ten runs mapped over devices and vmapped within them take less than half of the time of ten
runs in sequence, and have the same curves. README.md beside this file says how much of it holds.

One cell (N = 2, R3) in the setting of the paper's study, a seed a run. After compilation each round
advances every run to its next evaluation, by each way, in random order:

    in sequence      the program of a single run, on one device
    looped           the program of `programs.over_runs`, where each device loops over its runs:
                     what a study does on a CPU
    vmapped          the same, where each device makes its runs at once: what it does elsewhere

On a CPU a device is a share of the cores (`jax_num_cpu_devices`). Prints one Markdown table of
seconds of a round, wall time and CPU time, as ratios to "in sequence", and the largest difference
between the curves.

With `--whole` the runs are whole ones instead, from the command line to the report: one study with
ten seeds against ten studies with one seed, one after another, each of which compiles its program
as any other process would.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable import program
from jaxrl_stable.study.__main__ import build
from jaxrl_stable.study.config import Study
from jaxrl_stable.study.programs import over_runs, scoring
from jaxrl_stable.study.runner import Member, Wave, begin_runs, make_starts
from jaxrl_stable.study.runs import advance, heldout_score

CURVES = ("reward", "entropy", "kl")
GIN_FILE = "experiments/paper/base.gin"
ONE_CELL = (
    "study.Study.grids = (@study.Grid(),)",
    "study.Grid.mini_batches = (2,)",
    "study.Grid.replay = ('R3',)",
)


def make_study(runs: int) -> Study:
    """One cell, with a seed for each run; their cold starts are short, as they are not measured."""
    bindings = (*ONE_CELL, f"study.Study.seeds = {runs}", "study.ColdStart.steps = 100")
    return program.load([GIN_FILE], bindings, build)


def member(runs, i):
    """Run `i` of a stack, on the first device."""
    return jax.device_put(jax.tree.map(lambda x: x[i], runs), jax.devices()[0])


def in_sequence(program):
    """Advances runs one by one; curves come back stacked, as from `over_runs`."""

    def step(runs, first):
        made = [jax.block_until_ready(program(run, first)) for run in runs]
        curves = jax.tree.map(lambda *x: np.stack(x), *(curves for _, curves, _ in made))
        return [run for run, _, _ in made], curves

    return step


def side_by_side(program):
    def step(runs, first):
        runs, curves, _ = jax.block_until_ready(program(runs, first))
        return runs, jax.tree.map(np.asarray, curves)

    return step


def compiled(name, function, runs):
    begin = time.perf_counter()
    made = jax.jit(function).lower(runs, jnp.int32(0)).compile()
    print(f"compiled {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return made


def measure(steps, states, rounds, rollouts):
    """Wall and CPU seconds [rounds, ways, 2], and the curves of each way, round after round."""
    rng, seconds = np.random.default_rng(0), np.empty((rounds, len(steps), 2))
    curves = {name: [] for name in steps}
    for number in range(rounds):
        for i in rng.permutation(len(steps)):
            name = list(steps)[i]
            begin = time.perf_counter(), time.process_time()
            states[name], made = steps[name](states[name], jnp.int32(number * rollouts))
            seconds[number, i] = np.subtract((time.perf_counter(), time.process_time()), begin)
            curves[name].append({curve: made[curve] for curve in CURVES})
    joined = {
        name: {c: np.concatenate([x[c] for x in made], axis=-1) for c in CURVES}
        for name, made in curves.items()
    }
    return seconds, joined


def spread(ratios):
    """Median, smallest and largest."""
    return f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"


def table(seconds, curves):
    """Prints one row for each way; the first of them is what the others are compared with."""
    first, base = next(iter(curves)), seconds[:, 0]
    print(f"{first}, seconds of a round: {spread(base[:, 0])}, CPU time {spread(base[:, 1])}\n")
    length = curves[first][CURVES[0]].shape[-1]
    print("| | wall time | CPU time ", end="")
    print(f"| apart in {', '.join(CURVES)}: first rollout | of {length} |\n|---|---|---|---|---|")
    for i, (way, made) in enumerate(curves.items()):
        ratios = (spread(seconds[:, i, j] / base[:, j]) for j in (0, 1))
        apart = [np.abs(made[name] - curves[first][name]) for name in CURVES]
        early = ", ".join(f"{x[:, 0].max():.1e}" for x in apart)
        whole = ", ".join(f"{x.max():.1e}" for x in apart)
        print(f"| {way} | {' | '.join(ratios)} | {early} | {whole} |")


def whole_runs(runs):
    """Wall seconds of one study with all seeds, and of as many studies with one seed each."""

    def seconds(directory, first, seeds):
        command = [sys.executable, "-m", "jaxrl_stable.study", f"--gin_file={GIN_FILE}"]
        command += [f"--gin.{line.replace(' = ', '=')}" for line in ONE_CELL]
        command += [f"--gin.study.Study.first_seed={first}", f"--gin.study.Study.seeds={seeds}"]
        begin = time.perf_counter()
        command.append(f"--workdir={directory}")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as scratch:
        together = seconds(f"{scratch}/all", 0, runs)
        print(f"one study of {runs} seeds: {together:.0f} s", flush=True)
        each = np.array([seconds(f"{scratch}/{i}", i, 1) for i in range(runs)])
    print(f"{runs} studies of one: {each.sum():.0f} s, each {spread(each)} s")
    print(f"ratio {together / each.sum():.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="a multiple of --devices")
    parser.add_argument("--devices", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=4, help="evaluation intervals")
    parser.add_argument("--whole", action="store_true", help="whole runs instead of rounds")
    options = parser.parse_args()
    if options.whole:
        whole_runs(options.runs)
        return
    if jax.config.jax_num_cpu_devices == -1:
        jax.config.update("jax_num_cpu_devices", options.devices)
    devices, study = jax.devices(), make_study(options.runs)
    cells = study.cells()
    ((name, cell),) = cells.items()
    members = tuple(Member(name, seed) for seed in range(options.runs))
    rollouts = study.gradient_steps // study.evaluations // cell.objective.mini_batches
    begin = time.perf_counter()
    starts = make_starts(study, devices, [cell.cold_start], scoring(study, devices))
    print(f"{options.runs} cold starts: {time.perf_counter() - begin:.0f} s", flush=True)
    runs = begin_runs(study, cells, Wave(members, (name,), options.runs), starts, devices)

    def step(run, first):
        """To the next evaluation, and that."""
        run, curves = advance(
            run,
            first,
            study=study,
            objectives=(cell.objective,),
            rollout_format=cell.rollout_format,
        )
        return run, curves, heldout_score(run.state.model, study)

    singles = [member(runs, i) for i in range(options.runs)]
    states = {"in sequence": singles, "looped": runs, "vmapped": runs}
    steps = {"in sequence": in_sequence(compiled("in sequence", step, singles[0]))}
    for way in ("looped", "vmapped"):
        made = compiled(way, over_runs(step, devices, vmapped=way == "vmapped"), runs)
        steps[way] = side_by_side(made)
    seconds, curves = measure(steps, states, options.rounds, rollouts)
    print(f"\n{options.runs} runs, {len(devices)} devices\n")
    table(seconds, curves)


if __name__ == "__main__":
    main()
