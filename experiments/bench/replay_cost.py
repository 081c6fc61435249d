"""What Routing Replay costs: time of a training step, and memory of its programs.

    python experiments/bench/replay_cost.py [--repetitions=30] [--json=PATH]

Claim: with R3 a step is at most 2 % slower, and memory grows by the L · K bytes per token of the
routing. Steps are those of `train` with the settings of experiments/quickstart.gin (512 rows of 58
tokens, N = 4, 2 MoE layers, 8 experts, 2 per token): an int8 copy for the sampler, rollout, score
and four updates of a policy with random weights, always from the same state and with the same
random numbers. Every arm needs the pass of `score`, since N > 1; the arms differ only in
`Objective.replay`. Arms run in random order. "none again" repeats the programs of "none" and so
shows the noise. `--json` writes the file that a study's report shows.

Time on two idle cores (`--repetitions=140`, 12 minutes). Ratios of medians with 95 % bootstrap
intervals over pairs of neighbouring steps; with the usual 30 steps the intervals are ± 4 %:

    140 steps of each       wall time               CPU time
    R3 / none               0.994 [0.975, 1.018]    0.995 [0.977, 1.011]
    none again / none       1.004 [0.982, 1.022]    0.999 [0.982, 1.014]

R3 is indistinguishable from the same programs run again. The intervals exclude a cost of more than
2 %, in wall time and in CPU time.

Memory: the compiler's account of each program (`memory_analysis`), divided by the tokens (rows ×
columns) of its arrays. Routing takes L · K · bytes of an id = 2 · 2 · 1 = 4 bytes per token, and
its mask takes one.

    extra bytes per token                   arguments  temporaries  outputs  all, without
    rollout, routing recorded / dropped     0.00       2.35         5.00     1790
    score, routing compared / dropped       5.00       0.53         9.00     487
    score, R3 / none                        0.00       0.62         0.00     502
    update, R3 / none                       5.00       4.00         0.00     18441

- A rollout hands on 5 bytes per token: L · K of experts and one of the mask. Routing adds nothing
  else to a batch, and adds it with `replay="none"` too, because the metrics compare the sampler's
  experts with the trainer's. So R3 makes no batch larger. "Dropped" is the same program when nobody
  asks for the routing: the compiler then removes it.
- `score` reads the 5 bytes and returns them. The other 4 bytes of its outputs count differing
  layers, for the samples.
- `update` with `replay="none"` doesn't read the routing. With R3 it reads the 5 bytes of one
  mini-batch at a time and copies the experts once (4.00) when it cuts the micro-batches. That is
  0.05 % of the program's memory.

Other compilers may need other temporaries. Arguments and outputs are the same everywhere.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable.configs import Objective, Optimizer, Reinforcement
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.routing import expert_dtype
from jaxrl_stable.run.programs import Programs, make_programs
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.optimizer import init_state, make_optimizer
from jaxrl_stable.trainer.score import score, with_old_policy

CONFIG, WIDTH, TOKENS = tiny(vocab_size=256), 34, 24
SAMPLING = Sampling(TOKENS)  # no stop token: every response has the same length
ARMS = {"none": "none", "none again": "none", "R3": "R3"}


def reinforcement(replay: str) -> Reinforcement:
    """The settings of experiments/quickstart.gin, with `replay`."""
    return Reinforcement(
        prompts=64,
        group_size=8,
        max_tokens=TOKENS,
        rollout_format="int8",
        micro_batch_size=64,
        objective=Objective(mini_batches=4, replay=replay),
        optimizer=Optimizer(learning_rate=5e-4, warmup_steps=10),
    )


def inputs(rows):
    """Returns prompts, their mask, the sampler's key and advantages."""
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.integers(3, CONFIG.vocab_size, (rows, WIDTH)), jnp.int32)
    mask = jnp.asarray(np.arange(WIDTH) >= rng.integers(0, WIDTH // 2, rows)[:, None])
    return prompts, mask, jax.random.key(1), jnp.asarray(rng.normal(size=rows), jnp.float32)


def training_step(programs: Programs, state, prompts, mask, key, advantages):
    """One step of `train`, from prompts and advantages to the next state and its metrics."""
    trajectory = programs.rollout(programs.quantize(state.model), prompts, mask, key)
    batch = make_batch(trajectory, advantages)
    scored = programs.score(state.model, batch)
    updates = []
    for mini_batch in programs.split(with_old_policy(batch, scored)):
        state, measured = programs.update(state, mini_batch)
        updates.append(measured)
    return jax.block_until_ready((state, programs.summarize(updates, scored.metrics)))


def time_steps(programs, state, data, repetitions):
    """Returns wall and CPU seconds [repetitions, arms, 2]."""
    rng, seconds = np.random.default_rng(0), np.empty((repetitions, len(ARMS), 2))
    for repetition in range(-1, repetitions):  # the first compiles
        for arm in rng.permutation(len(ARMS)):
            fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # an update donates it
            begin = time.perf_counter(), time.process_time()
            training_step(programs[list(ARMS.values())[arm]], fresh, *data)
            end = time.perf_counter(), time.process_time()
            if repetition >= 0:
                seconds[repetition, arm] = np.subtract(end, begin)
    return seconds


def ratio(numerator, denominator, resamples=10_000):
    """Formats the ratio of medians, with a 95 % bootstrap over pairs of neighbouring steps."""
    drawn = np.random.default_rng(0).integers(len(numerator), size=(resamples, len(numerator)))
    medians = [np.median(x[drawn], axis=-1) for x in (numerator, denominator)]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return f"{np.median(numerator) / np.median(denominator):.3f} [{low:.3f}, {high:.3f}]"


def program_bytes(function, *arguments):
    """Returns the bytes of a compiled program: arguments that it reads, temporaries, outputs."""
    stats = function.lower(*arguments).compile().memory_analysis()
    parts = stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.output_size_in_bytes
    return np.array(parts)


def memory(programs, state, data):
    """Returns rows (comparison, tokens of the program's arrays, bytes without, bytes with)."""
    prompts, mask, key, advantages = data
    sampler = programs["R3"].quantize(state.model)
    batch = make_batch(programs["R3"].rollout(sampler, prompts, mask, key), advantages)
    rl = reinforcement("none")
    passes = dict(micro_batch_size=rl.micro_batch_size, temperature=rl.temperature)

    @jax.jit
    def unrecorded(*arguments):  # the compiler drops unused outputs
        made = rollout(*arguments, sampling=SAMPLING)
        return made.tokens, made.real, made.response_mask, made.logp_rollout, made.finished

    @jax.jit
    def uncompared(model, batch):
        scored = score(model, batch, replay="none", **passes)
        mismatch = {k: v for k, v in scored.metrics.items() if not k.startswith("routing/")}
        return scored.logp_old, mismatch

    rolling, scoring = (sampler, prompts, mask, key), (state.model, batch)
    scores = {name: program_bytes(each.score, *scoring) for name, each in programs.items()}
    updates = {}
    for name, each in programs.items():
        mini_batch = each.split(with_old_policy(batch, each.score(*scoring)))[0]
        updates[name] = program_bytes(each.update, state, mini_batch)
    bare, recorded = (program_bytes(f, *rolling) for f in (unrecorded, programs["R3"].rollout))
    whole, part = batch.tokens.size, mini_batch.tokens.size
    return [
        ("rollout, routing recorded / dropped", whole, bare, recorded),
        (
            "score, routing compared / dropped",
            whole,
            program_bytes(uncompared, *scoring),
            scores["none"],
        ),
        ("score, R3 / none", whole, scores["none"], scores["R3"]),
        ("update, R3 / none", part, updates["none"], updates["R3"]),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=30, help="steps of each arm")
    parser.add_argument("--json", type=pathlib.Path, help="where to write or add the figures")
    options = parser.parse_args()
    programs = {name: make_programs(reinforcement(name), SAMPLING) for name in ("none", "R3")}
    rl = reinforcement("R3")
    state = init_state(init_model(CONFIG, 0), make_optimizer(rl.optimizer))
    data = inputs(rl.prompts * rl.group_size)
    print(f"{rl.prompts * rl.group_size} rows × {WIDTH + TOKENS} tokens, {jax.devices()[0]}\n")
    found = {}

    seconds = time_steps(programs, state, data, options.repetitions)
    wall, cpu = np.median(seconds[:, 0], axis=0)
    print(f"one step of none: {wall:.3f} s, CPU time {cpu:.3f} s (medians)\n")
    print(f"| {options.repetitions} steps of each | wall time | CPU time |\n|---|---|---|")
    for arm, label in ((2, "R3 / none"), (1, "none again / none")):
        wall, cpu = (ratio(seconds[:, arm, i], seconds[:, 0, i]) for i in (0, 1))
        print(f"| {label} | {wall} | {cpu} |", flush=True)
        found |= {f"Step, {label}: wall time": wall, f"Step, {label}: CPU time": cpu}

    layers, k = CONFIG.num_moe_layers, CONFIG.num_experts_per_token
    width = expert_dtype(CONFIG.num_experts).itemsize
    text = f"L · K · bytes of an id = {layers} · {k} · {width} = {layers * k * width} bytes a token"
    print(f"\nrouting: {text}, and one of the mask\n")
    found["Routing"] = text
    print("| extra bytes per token | arguments | temporaries | outputs | all, without |")
    print("|---|---|---|---|---|")
    for label, tokens, without, added in memory(programs, state, data):
        extra = [f"{x:.2f}" for x in (added - without) / tokens]
        print(f"| {label} | {' | '.join(extra)} | {without.sum() / tokens:.0f} |")
        names = "arguments", "temporaries", "outputs"
        found[f"Extra bytes a token, {label}"] = ", ".join(
            f"{name} {x}" for name, x in zip(names, extra, strict=True)
        )
    if options.json:
        held = json.loads(options.json.read_text()) if options.json.exists() else {}
        text = json.dumps(held | {"replay_cost": found}, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
