"""Runs of a study side by side against the same runs one after another.

    python experiments/bench/study_speed.py [--runs=10] [--devices=2] [--rounds=4]
    python experiments/bench/study_speed.py --whole

Claim: ten runs mapped over devices and vmapped within them take less than half of the time of ten
runs in sequence, and have the same curves. On a CPU the first part holds for whole runs and for the
loop, but **not for `vmap`**.

One cell (N = 2, R3) in the setting of the paper's study (`experiments/paper/base.gin`), one seed
per run: policies of width 32 with 4 MoE layers, an fp8_w8a8 sampler, rollouts of 128 rows, an
evaluation of 256 problems in each round of 8 rollouts. After compilation each round advances every
run to its next evaluation, each way, in random order:

    in sequence      the program of a single run, on one device
    looped           the program of `programs.over_runs`, where each device loops over its runs:
                     what a study does on a CPU
    vmapped          the same, where each device makes its runs at once: what it does elsewhere

On a CPU a device is a share of the cores (`jax_num_cpu_devices`). Prints one Markdown table: the
wall and CPU time of a round as ratios to the same round of "in sequence" (median, smallest and
largest), and the largest difference between the curves of any run.

With `--whole` it measures whole runs instead, from the command line to the report: one study with
ten seeds against ten studies with one seed, one after another, each of which compiles its program
as any other process would.

Rounds, 12 of them on two otherwise idle cores (`--rounds=12`):

    10 runs, 2 devices  wall time          CPU time           apart in reward, entropy, kl:
                                                              first rollout        of 96
    in sequence         1.00               1.00
    looped              0.49 [0.43, 0.55]  0.75 [0.66, 0.81]  0, 0, 0              1.6e-01, 3.0e-01,
                                                                                   2.0e-02
    vmapped             0.56 [0.46, 0.62]  0.87 [0.74, 0.97]  0, 1.2e-07, 1.2e-04  1.6e-01, 3.7e-01,
                                                                                   9.9e-02

Compilation is extra, once side by side and once per process that makes one run: 30 s for the
program of one run, 31 s looped, 36 s vmapped. The 24 rounds of ten whole runs would take 158 s in
sequence, at the median of 6.6 s.

Whole runs (`--whole`), with cold start, compilation, 24 rounds and plots, measured when a CPU still
vmapped its runs:

    one study of 10 seeds     210 s
    10 studies of one seed    984 s, each 99 [87, 105] s
    ratio                     0.21

- Ten runs as a study take 0.21 of the time of ten runs one after another, because each of these
  compiles for itself. In steady state, without compilation on either side, they take 0.49 looped
  (single rounds up to 0.55) and 0.56 vmapped, which is more than half. The loop is close to the
  limit of two cores: a single run makes some use of the second core too (1.26 cores), and the loop
  keeps 1.9 busy.
- Why a CPU loops: `vmap` turns the same work into 4 times fewer, larger operations (0.5 million
  profiler events per round instead of 1.9), but needs more CPU time for them. It saves calls and
  most of the cost of random numbers, and loses that again: XLA's sorts, gathers and products are
  slower with a batch dimension on a CPU, and the activations of five runs probably leave the cache.
  Pairs and threes of runs, vmapped in a loop, fell in between (0.47 and 0.48, where the loop took
  0.46 and `vmap` 0.49 to 0.51).
- The curves agree up to rounding. In the first rollout reward, entropy and KL agree to 1.2e-4, and
  exactly with the loop. The programs sum in different orders. Sooner or later that changes a
  sampled token, and the run becomes another draw from the same distribution.
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

from jaxrl_stable import gin_files
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
    """One cell with a seed per run; cold starts are short, as they are not measured."""
    bindings = (*ONE_CELL, f"study.Study.seeds = {runs}", "study.ColdStart.steps = 100")
    return gin_files.load([GIN_FILE], bindings, build)


def member(runs, i):
    """Returns run `i` of a stack, on the first device."""
    return jax.device_put(jax.tree.map(lambda x: x[i], runs), jax.devices()[0])


def in_sequence(program):
    """Returns a step that advances runs one by one and stacks the curves like `over_runs`."""

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
    """Returns wall and CPU seconds [rounds, ways, 2], and the joined curves of each way."""
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
    """Formats median, smallest and largest."""
    return f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"


def table(seconds, curves):
    """Prints one row per way; the first is the baseline of the others."""
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
    """Times one study with all seeds, and as many studies with one seed each."""

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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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
        """Advances a run to its next evaluation and evaluates it."""
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
