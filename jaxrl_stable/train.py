"""MiniRL: rollout, reward, score, N updates; again.

    python -m jaxrl_stable.train --gin_file=experiments/quickstart.gin --workdir=runs/quickstart

Run the same command again to go on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Key

from jaxrl_stable import diagnostics, hf, program, sft
from jaxrl_stable.advantages import centered
from jaxrl_stable.checkpoint import Checkpointer, load_model
from jaxrl_stable.configs import Experiment, Reinforcement
from jaxrl_stable.data import prompt_iterator
from jaxrl_stable.describe import implementations
from jaxrl_stable.diagnostics import Metrics
from jaxrl_stable.evaluate import evaluate, evaluation_key, make_sampler
from jaxrl_stable.gates import check_failed_rewards, check_finite, check_first_mini_batch
from jaxrl_stable.judge import judge, reward_metrics
from jaxrl_stable.metrics import Clock, MetricsWriter
from jaxrl_stable.model.transformer import Transformer, init_model, parameter_count
from jaxrl_stable.optimizer import TrainState, from_parts, init_state, make_optimizer, to_parts
from jaxrl_stable.preemption import Stopped, StopRequest
from jaxrl_stable.quantize import quantize
from jaxrl_stable.report import write_report
from jaxrl_stable.rollout import Trajectory, rollout
from jaxrl_stable.samples import sample_rows
from jaxrl_stable.sharding import (
    abstract_state,
    make_mesh,
    shard_rows,
    sharded_init,
    state_shardings,
)
from jaxrl_stable.task import Task, load_task
from jaxrl_stable.uncached import uncached_rollout
from jaxrl_stable.update import (
    Scored,
    TrainBatch,
    make_batch,
    score,
    split,
    update,
    with_old_policy,
)


class Programs(NamedTuple):
    """The jitted programs of a run; each compiles once."""

    quantize: Callable[[Transformer], Transformer]
    rollout: Callable[..., Trajectory]
    advantages: Callable[..., jax.Array]
    score: Callable[..., Scored]
    update: Callable[..., tuple[TrainState, Metrics]]
    split: Callable[[TrainBatch], list[TrainBatch]]
    summarize: Callable[[list[Metrics], Metrics], dict[str, jax.Array]]


def make_programs(rl: Reinforcement, task: Task) -> Programs:
    """Binds the settings of a run to the library's functions."""
    sampling = task.sampling(rl.max_tokens, rl.temperature, rl.top_k, rl.top_p)
    passes = dict(micro_batch_size=rl.micro_batch_size, temperature=rl.temperature)
    parts = rl.objective.mini_batches

    def mini_batches(batch: TrainBatch) -> list[TrainBatch]:
        stacked = split(batch, parts)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(parts)]

    def summarize(updates: list[Metrics], scored: Metrics) -> dict[str, jax.Array]:
        return diagnostics.finalize(diagnostics.merge(updates) | scored)

    sample = partial(rollout, sampling=sampling)
    if not rl.rollout_cache:
        sample = partial(uncached_rollout, sampling=sampling, micro_batch_size=rl.micro_batch_size)
    step = partial(
        update,
        objective=rl.objective,
        optimizer=make_optimizer(rl.optimizer),
        logp_source=rl.logp_source,
        **passes,
    )
    return Programs(
        quantize=jax.jit(partial(quantize, format=rl.rollout_format)),
        rollout=jax.jit(sample),
        advantages=jax.jit(centered),
        score=jax.jit(partial(score, replay=rl.objective.replay, **passes)),
        update=jax.jit(step, donate_argnums=0),
        split=jax.jit(mini_batches),
        summarize=jax.jit(summarize),
    )


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
        prompts = prompt_iterator(
            task.train,
            task.tokenizer,
            batch_size=rl.prompts,
            width=experiment.data.prompt_width,
            seed=experiment.seed,
            template=task.template,
        )
        state, key, start = restore_or_start(experiment, task, workdir, checkpoints, prompts)
        (workdir / "config.gin").write_text(program.resolved_config())
        programs = make_programs(rl, task)
        sampler = make_sampler(task, experiment.evaluation, rl.max_tokens)
        stop = stack.enter_context(StopRequest())
        writer = stack.enter_context(
            MetricsWriter(workdir, start_step=start if start else -1, total_steps=rl.steps)
        )

        def run_evaluation(step: int) -> float:
            key = evaluation_key(experiment.seed)
            result = evaluate(state.model, task, experiment, sampler, key)
            metrics = result.metrics()
            gradient_steps = {"gradient_steps": float(step * rl.objective.mini_batches)}
            writer.write(step, metrics | gradient_steps)
            return metrics["eval/avg_at_k"]

        if start == 0:
            checkpoints.save(0, to_parts(state) | {"key": key}, prompts, run_evaluation(0))

        for step in range(start + 1, rl.steps + 1):
            clock = Clock()
            with clock("rollout"):
                batch = next(prompts)
                problems = [p for p in batch["problems"] for _ in range(rl.group_size)]
                tokens, mask = (
                    np.repeat(batch[name], rl.group_size, axis=0) for name in ("tokens", "mask")
                )
                sampling_policy = programs.quantize(state.model)
                trajectory = programs.rollout(
                    sampling_policy,
                    *shard_rows(mesh, (tokens, mask)),
                    jax.random.fold_in(key, step),
                )
                jax.block_until_ready(trajectory)
            with clock("reward"):
                judged = judge(task, problems, trajectory)
                groups = np.repeat(np.arange(rl.prompts), rl.group_size)
                advantages = programs.advantages(
                    *shard_rows(mesh, (judged.rewards, groups, judged.valid))
                )
            with clock("score"):
                train_batch, scored = make_batch(trajectory, advantages), None
                if rl.needs_score:
                    scored = programs.score(state.model, train_batch)
                    train_batch = with_old_policy(train_batch, scored)
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
            values = clock.values() | reward_metrics(judged, rl.group_size)
            measured = programs.summarize(updates, scored.metrics if scored else {})
            values |= diagnostics.as_floats(measured)
            values["gradient/skipped"] = float(jax.device_get(state.skipped))
            values["gradient_steps"] = float(step * rl.objective.mini_batches)
            values["throughput/tokens_per_s"] = values["response/tokens"] / values["time/step"]
            writer.write(step, values)
            writer.progress(step, values)
            if step % rl.show_every == 0 or step == 1:
                rows = sample_rows(
                    problems, judged, advantages, train_batch, scored, task.tokenizer
                )
                writer.samples(step, rows)
                writer.show_sample(rows[0]["prompt"], rows[0]["response"], rows[0]["score"])
            check_failed_rewards(values["reward/failed_share"], rl.max_failed_rewards, step)

            last, accuracy = step == rl.steps, None
            if step % experiment.evaluation.every == 0 or last:
                accuracy = run_evaluation(step)
            if step % rl.checkpoint_every == 0 or accuracy is not None or stop.requested:
                checkpoints.save(step, to_parts(state) | {"key": key}, prompts, accuracy)
            if stop.requested:
                raise Stopped(step, str(workdir))
    return state


def restore_or_start(
    experiment: Experiment,
    task: Task,
    workdir: pathlib.Path,
    checkpoints: Checkpointer,
    prompts: Iterator,
) -> tuple[TrainState, Key[jax.Array, ""], int]:
    """The newest checkpoint of this run, or a start: from other weights, a cold start, or nothing.

    Returns:
      The state, the key of the rollouts, and the number of finished steps.
    """
    rl, mesh = experiment.reinforcement, make_mesh(experiment.mesh)
    optimizer = make_optimizer(rl.optimizer)

    def fresh_model() -> Transformer:
        return init_model(experiment.model, experiment.seed)

    template = abstract_state(mesh, lambda: init_state(fresh_model(), optimizer))
    key_template = abstract_state(mesh, lambda: jax.random.key(0))
    restored = checkpoints.restore(to_parts(template) | {"key": key_template}, prompts)
    if restored:
        return from_parts(restored), restored["key"], checkpoints.steps[-1]
    origin = pathlib.Path(experiment.init_from)
    if experiment.init_from and (origin / "config.json").exists():
        model = hf.load(origin, mesh, experiment.model)
    elif experiment.init_from:
        model = load_model(origin / "checkpoints", experiment.model.architecture(), template.model)
    elif experiment.cold_start is not None:
        model = sft.train(experiment, task, workdir / "cold_start")
    else:
        model = sharded_init(mesh, fresh_model)
    start = jax.jit(
        partial(init_state, optimizer=optimizer), out_shardings=state_shardings(mesh, template)
    )
    return start(model), jax.random.key(experiment.seed), 0


def main(experiment: Experiment, workdir: str) -> None:
    """Trains, then writes the report."""
    print(implementations(experiment.model))
    begin = time.time()
    train(experiment, workdir)
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
