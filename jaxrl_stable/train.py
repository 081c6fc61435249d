"""MiniRL: rollout, reward, score, N updates; again.

    python -m jaxrl_stable.train --gin_file=experiments/quickstart.gin --workdir=runs/quickstart

Run the same command again to go on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable import diagnostics, distributed, program
from jaxrl_stable.batch import TrainBatch, make_batch, split
from jaxrl_stable.checkpoint import Checkpointer
from jaxrl_stable.configs import Experiment, Reinforcement
from jaxrl_stable.data import prompt_iterator
from jaxrl_stable.describe import implementations
from jaxrl_stable.diagnostics import Metrics
from jaxrl_stable.dynamic_sampling import Round, collect, fill_rows
from jaxrl_stable.evaluate import evaluate, evaluation_key, make_sampler
from jaxrl_stable.gates import check_failed_rewards, check_finite, check_first_mini_batch
from jaxrl_stable.judge import Judged, failed_share, informative, judge, reward_metrics
from jaxrl_stable.metrics import Clock, open_writer
from jaxrl_stable.model.transformer import Transformer, parameter_count
from jaxrl_stable.optimizer import TrainState, make_optimizer, to_parts
from jaxrl_stable.preemption import Stopped, StopRequest
from jaxrl_stable.quantize import quantize, sampling_copy
from jaxrl_stable.report import write_report
from jaxrl_stable.rewards import overlong_penalty
from jaxrl_stable.rollout import Sampling, Trajectory, rollout
from jaxrl_stable.samples import sample_rows
from jaxrl_stable.sharding import make_mesh, row_sharding, shard_rows
from jaxrl_stable.start import first_policy, restore_or_start
from jaxrl_stable.task import load_task
from jaxrl_stable.uncached import uncached_rollout
from jaxrl_stable.update import Scored, score, update, with_old_policy


class Programs(NamedTuple):
    """The jitted programs of a run; each compiles once."""

    quantize: Callable[[Transformer], Transformer]
    rollout: Callable[..., Trajectory]
    fill: Callable[..., Trajectory]
    advantages: Callable[..., jax.Array]
    score: Callable[..., Scored]
    reference: Callable[..., jax.Array]
    update: Callable[..., tuple[TrainState, Metrics]]
    split: Callable[[TrainBatch], list[TrainBatch]]
    summarize: Callable[[list[Metrics], Metrics], dict[str, jax.Array]]


def make_programs(rl: Reinforcement, sampling: Sampling) -> Programs:
    """Binds the settings of a run to the library's functions."""
    parts = rl.objective.mini_batches
    passes = dict(
        micro_batch_size=rl.micro_batch_size, temperature=rl.temperature, packed=rl.packed
    )
    scoring = partial(score, mini_batches=parts, **passes)

    def mini_batches(batch: TrainBatch) -> list[TrainBatch]:
        stacked = split(batch, parts)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(parts)]

    def summarize(updates: list[Metrics], scored: Metrics) -> dict[str, jax.Array]:
        return diagnostics.finalize(diagnostics.merge(updates) | scored)

    copy, sample = sampling_copy, partial(rollout, sampling=sampling, at_a_time=rl.rollout_rows)
    if not rl.rollout_cache:  # the training program, on weights that lie as in training
        copy = quantize
        sample = partial(uncached_rollout, sampling=sampling, micro_batch_size=rl.micro_batch_size)
    step = partial(
        update,
        objective=rl.resolved_objective,
        optimizer=make_optimizer(rl.optimizer),
        **passes,
    )

    def advantages(kept, *rewards) -> jax.Array:
        return jnp.where(kept, rl.objective.advantages(*rewards), 0.0)

    def reference(model: Transformer, batch: TrainBatch) -> jax.Array:
        return scoring(model, batch, replay="none").logp_old  # other weights, other routes

    return Programs(
        quantize=jax.jit(partial(copy, format=rl.rollout_format)),
        rollout=jax.jit(sample),
        fill=jax.jit(fill_rows),
        advantages=jax.jit(advantages),
        score=jax.jit(partial(scoring, replay=rl.objective.replay)),
        reference=jax.jit(reference),
        update=jax.jit(step, donate_argnums=0),
        split=jax.jit(mini_batches),
        summarize=jax.jit(summarize),
    )


def advantage_inputs(rl: Reinforcement, judged: Judged) -> tuple[np.ndarray, ...]:
    """What `Programs.advantages` takes: which rows keep theirs, then the arrays of `advantages`."""
    kept = judged.finished if rl.overlong_filter else np.ones_like(judged.finished)
    buffer = round(rl.overlong_buffer * rl.max_tokens)
    penalty = overlong_penalty(judged.lengths, rl.max_tokens, buffer)
    groups = np.repeat(np.arange(rl.prompts), rl.group_size)
    return kept, judged.rewards + penalty, groups, judged.valid, judged.lengths


def train(experiment: Experiment, workdir: str | pathlib.Path) -> TrainState:
    """Runs an experiment from wherever its working directory stands.

    Raises:
      ValueError, FileNotFoundError: something in the experiment or its data is wrong.
      RuntimeError: the first mini-batch after a start disagrees with `score`, or too many
        gradients in a row were not finite.
      Stopped: SIGTERM came; the state is saved.
    """
    workdir, rl = pathlib.Path(workdir), experiment.reinforcement
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        task = stack.enter_context(load_task(experiment, workdir))
        checkpoints = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints",
                experiment.model.architecture(),
                rl.keep_checkpoints,
                data=f"{task.identity}, {rl.prompts} prompts a step, seed {experiment.seed}",
            )
        )
        known = f"{program.resolved_config()} {task.identity} {checkpoints.steps}"
        distributed.check_same("configuration, data set or newest checkpoint", known)
        held = distributed.held_rows(row_sharding(mesh), rl.prompts * rl.group_size)
        prompts = prompt_iterator(
            task.train,
            task.tokenizer,
            batch_size=rl.prompts,
            width=experiment.data.prompt_width,
            seed=experiment.seed,
            template=task.template,
            held=held.reshape(rl.prompts, rl.group_size).any(-1),
        )
        state, key, start = restore_or_start(experiment, task, workdir, checkpoints, prompts)
        reference = None
        if rl.objective.kl_coefficient:
            reference = first_policy(experiment, task, workdir)
        if distributed.is_main():
            (workdir / "config.gin").write_text(program.resolved_config())
        programs = make_programs(
            rl, task.sampling(rl.max_tokens, rl.temperature, rl.top_k, rl.top_p)
        )
        sampler = make_sampler(task, experiment.evaluation, rl.max_tokens)
        stop = stack.enter_context(StopRequest())
        writer = stack.enter_context(
            open_writer(workdir, start_step=start if start else -1, total_steps=rl.steps)
        )

        def run_evaluation(step: int) -> float:
            key = evaluation_key(experiment.seed)
            result = evaluate(state.model, task, experiment, sampler, key)
            metrics = result.metrics()
            gradient_steps = {"gradient_steps": float(step * rl.objective.mini_batches)}
            writer.write(step, metrics | gradient_steps)
            return metrics["eval/avg_at_k"]

        def draw(step: int, clock: Clock, number: int) -> Round:
            with clock("rollout"):
                batch = next(prompts)
                problems = [p for p in batch["problems"] for _ in range(rl.group_size)]
                tokens, mask = (
                    np.repeat(batch[name], rl.group_size, axis=0) for name in ("tokens", "mask")
                )
                step_key = jax.random.fold_in(key, step)
                trajectory = programs.rollout(
                    programs.quantize(state.model),
                    *shard_rows(mesh, (tokens, mask)),
                    jax.random.fold_in(step_key, number) if number else step_key,
                )
                jax.block_until_ready(trajectory)
            with clock("reward"):
                index = np.repeat(batch["index"], rl.group_size)
                return Round(index, trajectory, judge(task, problems, trajectory))

        if start == 0:
            checkpoints.save(0, to_parts(state) | {"key": key}, prompts, run_evaluation(0))

        for step in range(start + 1, rl.steps + 1):
            clock = Clock()
            (index, trajectory, judged), rounds = collect(
                partial(draw, step, clock), programs.fill, rl.group_size, rl.max_rounds
            )
            with clock("reward"):
                arrays = shard_rows(mesh, advantage_inputs(rl, judged))
                advantages = programs.advantages(*arrays)
            with clock("score"):
                train_batch, scored = make_batch(trajectory, advantages), None
                if rl.objective.needs_score:
                    scored = programs.score(state.model, train_batch)
                    train_batch = with_old_policy(train_batch, scored)
                if reference is not None:
                    logp_reference = programs.reference(reference, train_batch)
                    train_batch = dataclasses.replace(train_batch, logp_reference=logp_reference)
                jax.block_until_ready(train_batch)
            with clock("update"), jax.transfer_guard("disallow"):
                updates: list[Metrics] = []
                for mini_batch in programs.split(train_batch):
                    state, measured = programs.update(state, mini_batch)
                    updates.append(measured)
                jax.block_until_ready(state)

            if scored is not None and step == start + 1:
                check_first_mini_batch(updates[0], rl.gate(experiment.model.dtype), step)
            check_finite(state, rl.max_skipped)
            values = clock.values() | reward_metrics(rounds[0], rl.group_size)
            values["reward/failed_share"] = failed_share(rounds)
            values["response/tokens"] = float(sum(each.lengths.sum() for each in rounds))
            values["sampling/rounds"] = float(len(rounds))
            values["sampling/informative_share"] = informative(judged, rl.group_size).mean()
            measured = programs.summarize(updates, scored.metrics if scored else {})
            values |= diagnostics.as_floats(measured)
            values["gradient/skipped"] = float(jax.device_get(state.skipped))
            values["gradient_steps"] = float(step * rl.objective.mini_batches)
            values["throughput/tokens_per_s"] = values["response/tokens"] / values["time/step"]
            writer.write(step, values)
            writer.progress(step, values)
            if step % rl.show_every == 0 or step == 1:
                shown = [task.train[int(i)] for i in index[:4]]
                rows = sample_rows(shown, judged, advantages, train_batch, scored, task)
                writer.samples(step, rows)
                writer.show_sample(rows[0]["prompt"], rows[0]["response"], rows[0]["score"])
            check_failed_rewards(values["reward/failed_share"], rl.max_failed_rewards, step)

            last, accuracy, stopping = step == rl.steps, None, stop.agreed()
            if step % experiment.evaluation.every == 0 or last:
                accuracy = run_evaluation(step)
            if step % rl.checkpoint_every == 0 or accuracy is not None or stopping:
                checkpoints.save(step, to_parts(state) | {"key": key}, prompts, accuracy)
            if stopping:
                raise Stopped(step, str(workdir))
    return state


def main(experiment: Experiment, workdir: str) -> None:
    """Trains, then writes the report."""
    if distributed.is_main():
        print(implementations(experiment))
    begin = time.time()
    train(experiment, workdir)
    if not distributed.is_main():
        return
    summary = {
        "name": pathlib.Path(workdir).name,
        "parameters": parameter_count(experiment.model),
        "devices": [str(device) for device in jax.devices()],
        "seconds": time.time() - begin,
    }
    pathlib.Path(workdir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
    program.run(main)
