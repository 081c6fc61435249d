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
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxrl_stable import diagnostics, program, sft
from jaxrl_stable.advantages import centered
from jaxrl_stable.checkpoint import Checkpointer, load_model
from jaxrl_stable.configs import Experiment, Reinforcement
from jaxrl_stable.data import prompt_iterator
from jaxrl_stable.describe import describe
from jaxrl_stable.diagnostics import Metrics
from jaxrl_stable.evaluate import evaluate, make_sampler
from jaxrl_stable.metrics import MetricsWriter
from jaxrl_stable.model.transformer import Transformer, init_model, parameter_count
from jaxrl_stable.optimizer import TrainState, from_parts, init_state, make_optimizer, to_parts
from jaxrl_stable.preemption import Stopped, StopRequest
from jaxrl_stable.quantize import quantize
from jaxrl_stable.report import write_report
from jaxrl_stable.rewards import Verdict
from jaxrl_stable.rollout import Trajectory, rollout
from jaxrl_stable.sharding import abstract_state, make_mesh, shard_rows, sharded_init
from jaxrl_stable.task import Task, load_task
from jaxrl_stable.update import TrainBatch, make_batch, score, split, update

DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would run, and stop")


class Programs(NamedTuple):
    """The jitted programs of a run; each compiles once."""

    quantize: Callable[[Transformer], Transformer]
    rollout: Callable[..., Trajectory]
    advantages: Callable[..., jax.Array]
    score: Callable[..., tuple[TrainBatch, Metrics]]
    update: Callable[..., tuple[TrainState, Metrics]]
    split: Callable[[TrainBatch], list[TrainBatch]]


def make_programs(rl: Reinforcement, task: Task) -> Programs:
    """Binds the settings of a run to the library's functions."""
    sampling = task.sampling(rl.max_tokens, rl.temperature, rl.top_k, rl.top_p)
    passes = dict(micro_batch_size=rl.micro_batch_size, temperature=rl.temperature)
    parts = rl.objective.mini_batches

    def fix_old_policy(model: Transformer, batch: TrainBatch) -> tuple[TrainBatch, Metrics]:
        scored = score(model, batch, replay=rl.objective.replay, **passes)
        batch = dataclasses.replace(batch, logp_old=scored.logp_old, routing=scored.routing)
        return batch, scored.metrics

    def mini_batches(batch: TrainBatch) -> list[TrainBatch]:
        stacked = split(batch, parts)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(parts)]

    step = partial(update, objective=rl.objective, optimizer=make_optimizer(rl.optimizer), **passes)
    return Programs(
        quantize=jax.jit(partial(quantize, format=rl.rollout_format)),
        rollout=jax.jit(partial(rollout, sampling=sampling)),
        advantages=jax.jit(centered),
        score=jax.jit(fix_old_policy),
        update=jax.jit(step, donate_argnums=0),
        split=jax.jit(mini_batches),
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
    key = jax.random.key(experiment.seed)
    rollout_key, evaluation_key = jax.random.split(key)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        task = stack.enter_context(load_task(experiment, workdir))
        checkpoints = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints", experiment.model.architecture(), rl.keep_checkpoints
            )
        )
        prompts = prompt_iterator(
            task.train,
            task.tokenizer,
            batch_size=rl.prompts,
            width=experiment.data.prompt_width,
            seed=experiment.seed,
            template=experiment.data.template,
        )
        state, start = restore_or_start(experiment, task, workdir, checkpoints, prompts)
        programs = make_programs(rl, task)
        sampler = make_sampler(task, experiment.evaluation, rl.max_tokens)
        stop = stack.enter_context(StopRequest())
        writer = stack.enter_context(
            MetricsWriter(workdir, start_step=start if start else -1, total_steps=rl.steps)
        )

        def run_evaluation(step: int) -> float:
            result = evaluate(state.model, task, experiment, sampler, evaluation_key)
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
                    jax.random.fold_in(rollout_key, step),
                )
                jax.block_until_ready(trajectory)
            with clock("reward"):
                sampled = jax.device_get((trajectory.tokens, trajectory.response_mask))
                responses = task.decode(*sampled)
                verdicts = task.reward(problems, responses)
                rewards = np.array([v.score for v in verdicts], np.float32)
                valid = np.array([not v.failed for v in verdicts])
                groups = np.repeat(np.arange(rl.prompts), rl.group_size)
                advantages = programs.advantages(*shard_rows(mesh, (rewards, groups, valid)))
            metrics: list[Metrics] = []
            with clock("score"):
                train_batch = make_batch(trajectory, advantages)
                if rl.objective.needs_score:
                    train_batch, scored = programs.score(state.model, train_batch)
                    metrics.append(scored)
                jax.block_until_ready(train_batch)
            with clock("update"):
                updates: list[Metrics] = []
                for mini_batch in programs.split(train_batch):
                    state, measured = programs.update(state, mini_batch)
                    updates.append(measured)
                metrics.append(diagnostics.merge(updates))
                jax.block_until_ready(state)

            if step == start + 1 and rl.objective.needs_score:
                check_first_mini_batch(updates[0], rl.gate(experiment.model.dtype), step)
            values = clock.values() | reward_metrics(trajectory, verdicts, rl.group_size)
            for part in metrics:
                values |= diagnostics.as_floats(diagnostics.finalize(part))
            values["gradient/skipped"] = float(state.skipped)
            values["gradient_steps"] = float(step * rl.objective.mini_batches)
            values["throughput/tokens_per_s"] = values["response/tokens"] / values["time/step"]
            writer.write(step, values)
            writer.progress(step, values)
            if step % rl.show_every == 0 or step == 1:
                rows = sample_rows(
                    problems, responses, verdicts, advantages, train_batch, task.tokenizer
                )
                writer.samples(step, rows)
                writer.show_sample(rows[0]["prompt"], rows[0]["response"], rows[0]["score"])
            check_finite(state, rl.max_skipped)

            last, accuracy = step == rl.steps, None
            if step % experiment.evaluation.every == 0 or last:
                accuracy = run_evaluation(step)
            if step % rl.checkpoint_every == 0 or last or stop.requested:
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
) -> tuple[TrainState, int]:
    """The newest checkpoint of this run, or a start from a cold start, another run, or nothing.

    Returns:
      The state, and the number of finished steps.
    """
    rl, mesh = experiment.reinforcement, make_mesh(experiment.mesh)
    optimizer = make_optimizer(rl.optimizer)

    def fresh_model() -> Transformer:
        return init_model(experiment.model, experiment.seed)

    template = abstract_state(mesh, lambda: init_state(fresh_model(), optimizer))
    key = abstract_state(mesh, lambda: jax.random.key(0))
    restored = checkpoints.restore(to_parts(template) | {"key": key}, prompts)
    if restored:
        return from_parts(restored), checkpoints.steps[-1]
    if experiment.init_from:
        model = load_model(
            pathlib.Path(experiment.init_from, "checkpoints"),
            experiment.model.architecture(),
            template.model,
        )
    elif experiment.cold_start is not None:
        model = sft.train(experiment, task, workdir / "cold_start")
    else:
        model = sharded_init(mesh, fresh_model)
    return jax.jit(partial(init_state, optimizer=optimizer))(model), 0


def check_first_mini_batch(metrics: Metrics, tolerance: float, step: int) -> None:
    """Right after `score` nothing has been updated, so π_θ/π_old is 1 but for rounding.

    Raises:
      RuntimeError: it is not; the run would optimise against a wrong π_old.
    """
    deviation = float(metrics["staleness/ratio_deviation_max"].value())
    if not deviation <= tolerance:
        raise RuntimeError(
            f"step {step}: max |π_θ/π_old − 1| is {deviation:.2e} in the first mini-batch, above "
            f"{tolerance:.0e}; score and update disagree on the same weights. Check that both use "
            "the same micro-batch size, temperature and replay, or set "
            "Reinforcement.ratio_tolerance if this much rounding is expected"
        )


def check_finite(state: TrainState, limit: int) -> None:
    """Stops a run whose gradients stay non-finite.

    Raises:
      RuntimeError: `limit` or more steps in a row were skipped.
    """
    in_a_row = int(state.skipped_in_a_row)
    if in_a_row >= limit:
        raise RuntimeError(
            f"the last {in_a_row} gradients were not finite and were skipped; the weights are as "
            "before them. Lower the learning rate or look at weight/raw_max and mismatch/abs_max"
        )


def reward_metrics(
    trajectory: Trajectory, verdicts: list[Verdict], group_size: int
) -> dict[str, float]:
    """What the host knows of a rollout batch.

    - `reward/mean`: mean score of the responses whose checker did not fail
    - `reward/accuracy`: share of them with score 1 or more
    - `reward/failed_share`: share of responses whose checker timed out or broke
    - `reward/zero_variance_share`: share of groups whose scores are all equal (no gradient)
    - `response/length`: mean tokens, EOS included; `response/tokens`: their sum
    - `response/truncated_share`: share of responses that did not end by themselves
    """
    scores = np.array([np.nan if v.failed else v.score for v in verdicts])
    known = scores[~np.isnan(scores)]
    groups = scores.reshape(-1, group_size)
    spread = np.nanmax(groups, axis=1, initial=-np.inf) - np.nanmin(groups, axis=1, initial=np.inf)
    mask, finished = jax.device_get((trajectory.response_mask, trajectory.finished))
    return {
        "reward/mean": float(known.mean()) if known.size else 0.0,
        "reward/accuracy": float((known >= 1.0).mean()) if known.size else 0.0,
        "reward/failed_share": float(np.isnan(scores).mean()),
        "reward/zero_variance_share": float((spread <= 0).mean()),
        "response/length": float(mask.sum(-1).mean()),
        "response/tokens": float(mask.sum()),
        "response/truncated_share": float(1.0 - finished.mean()),
    }


def sample_rows(problems, responses, verdicts, advantages, batch, tokenizer, count=4) -> list[dict]:
    """The first responses with what happened to each token, for the report."""
    advantages = jax.device_get(advantages)
    first = jax.tree.map(
        lambda x: x[:count], (batch.tokens, batch.response_mask, batch.logp_rollout, batch.logp_old)
    )
    tokens, mask, logp_rollout, logp_old = jax.device_get(first)
    rows = []
    for i in range(count):
        row = {
            **problems[i],
            "response": responses[i],
            "score": verdicts[i].score,
            "status": verdicts[i].status,
            "advantage": float(advantages[i]),
            "tokens": [tokenizer.decode([int(t)]) for t in tokens[i][mask[i]]],
        }
        if logp_old is not None:
            row["log_weight"] = (logp_old[i] - logp_rollout[i])[mask[i]].tolist()
        rows.append(row)
    return rows


class Clock:
    """Seconds of each phase of one step."""

    def __init__(self) -> None:
        self._start, self._phases = time.perf_counter(), {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._phases[f"time/{phase}"] = time.perf_counter() - begin

    def values(self) -> dict[str, float]:
        return self._phases | {"time/step": time.perf_counter() - self._start}


def main(experiment: Experiment, workdir: str) -> None:
    """Trains, then writes the report; with --dry_run says what it would do."""
    if DRY_RUN.value:
        print(program.resolved_config())
        print(describe(experiment))
        return
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    pathlib.Path(workdir, "config.gin").write_text(program.resolved_config())
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
