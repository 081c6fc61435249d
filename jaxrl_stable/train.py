"""RL training loop: rollout, reward, score, N updates, repeat.

    python -m jaxrl_stable.train --gin_file=experiments/quickstart.gin --workdir=runs/quickstart

Run the same command again to continue from the last checkpoint. `--profile_steps=3:6` traces steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from absl import flags
from jaxtyping import Bool

from jaxrl_stable import _moved, diagnostics, distributed, program
from jaxrl_stable.checkpoint import Checkpointer, has_checkpoints
from jaxrl_stable.configs import Experiment, Reinforcement
from jaxrl_stable.data import prompt_iterator
from jaxrl_stable.diagnostics import Metrics
from jaxrl_stable.distributed.preemption import Stopped, StopRequest
from jaxrl_stable.gin_files import resolved_config
from jaxrl_stable.model.transformer import parameter_count
from jaxrl_stable.run.describe import implementations
from jaxrl_stable.run.dynamic_sampling import Round, collect
from jaxrl_stable.run.evaluation import evaluate, evaluation_key, make_sampler
from jaxrl_stable.run.gates import (
    check_conditions,
    check_failed_rewards,
    check_finite,
    check_first_mini_batch,
)
from jaxrl_stable.run.identity import data_of_run, settings_of_run
from jaxrl_stable.run.judge import (
    Judged,
    advantage_inputs,
    failed_share,
    judge,
    reward_metrics,
)
from jaxrl_stable.run.lock import locked
from jaxrl_stable.run.profile import Profiler, ProfileSteps, parse_profile_steps
from jaxrl_stable.run.programs import make_programs
from jaxrl_stable.run.reference import kept_reference
from jaxrl_stable.run.rehearsal import rehearse
from jaxrl_stable.run.samples import sample_rows
from jaxrl_stable.run.start import restore_or_start
from jaxrl_stable.run.task import load_task
from jaxrl_stable.run.wandb_log import check_installed
from jaxrl_stable.run.writer import Clock, open_writer
from jaxrl_stable.sharding import make_mesh, row_sharding, shard_rows
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.optimizer import TrainState, to_parts
from jaxrl_stable.trainer.score import with_old_policy

PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", "", "steps to trace, FIRST:LAST; see TensorBoard or Perfetto"
)


def train(
    experiment: Experiment, workdir: str | pathlib.Path, profile_steps: ProfileSteps | None = None
) -> TrainState:
    """Runs an experiment, from its newest checkpoint if its working directory has one.

    Args:
      experiment: what to run.
      workdir: directory of the run.
      profile_steps: steps to trace, if any.

    Returns:
      The last state.

    Raises:
      ValueError, FileNotFoundError: if the experiment or its data is invalid, if `workdir` holds
        another run, or if another run is writing to it.
      RuntimeError: if the first mini-batch after a start disagrees with `score`, if too many
        gradients in a row are not finite, or if a reward is outside the range that the advantages
        are right for.
      Stopped: if the run was asked to stop; the state is saved.
    """
    workdir, rl = pathlib.Path(workdir), experiment.reinforcement
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    check_installed(experiment.wandb_project)

    with contextlib.ExitStack() as stack:
        # --- Data, checkpoints, and agreement between processes -----------------------------------
        stack.enter_context(locked(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        cold_start = not has_checkpoints(workdir / "checkpoints")  # else it is over
        task = stack.enter_context(load_task(experiment, workdir, cold_start))
        checkpoints = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints",
                experiment.model.architecture(),
                rl.keep_checkpoints,
                data=data_of_run(experiment, task.identity),
                settings=settings_of_run(experiment, task.heldout, task.reward),
            )
        )
        known = f"{resolved_config()} {task.identity} {checkpoints.steps}"
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

        # --- State and programs -------------------------------------------------------------------
        state, key, start = restore_or_start(experiment, task, mesh, workdir, checkpoints, prompts)
        reference = None
        if rl.objective.kl_coefficient and start < rl.steps:
            reference = kept_reference(experiment, mesh, workdir)
        if distributed.is_main():
            (workdir / "config.gin").write_text(resolved_config(), encoding="utf-8")
        sampling = task.sampling(rl.max_tokens, rl.temperature, rl.top_k, rl.top_p)
        programs = make_programs(rl, sampling)
        sampler = make_sampler(task, experiment.evaluation, rl.max_tokens)
        stop = stack.enter_context(StopRequest())
        writer = stack.enter_context(
            open_writer(
                workdir,
                start_step=start if start else -1,
                total_steps=rl.steps,
                wandb_project=experiment.wandb_project,
                config=experiment,
            )
        )
        profiler = stack.enter_context(Profiler(workdir, profile_steps))

        def run_evaluation(step: int) -> float | None:
            """Records an evaluation; returns the score that ranks checkpoints, if it has one."""
            key = evaluation_key(experiment.seed)
            result = evaluate(state.model, task, experiment, mesh, sampler, key)
            gradient_steps = {"gradient_steps": float(step * rl.objective.mini_batches)}
            writer.write(step, result.metrics() | gradient_steps)
            score = result.score(experiment.evaluation.best, rl.max_failed_rewards)
            if score is None:
                writer.say(
                    f"step {step}: this evaluation has no score, because the reward failed on "
                    f"{result.failed_share:.0%} of its samples"
                )
            return score

        def draw(step: int, clock: Clock, number: int) -> Round:
            """Samples and judges one rollout batch; `number` counts the rounds of a step."""
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
                judged = judge(task, problems, trajectory)
                check_conditions(rl.objective.advantages, judged, step)
                return Round(index, trajectory, judged)

        def informative(judged: Judged) -> Bool[np.ndarray, "groups"]:
            arrays = shard_rows(mesh, advantage_inputs(rl, judged))
            return distributed.replicated(programs.informative(*arrays))

        if start == 0:
            checkpoints.save(0, to_parts(state) | {"key": key}, prompts, run_evaluation(0))

        for step in range(start + 1, rl.steps + 1):
            clock = Clock()
            with profiler.step(step):
                # --- Rollout, reward and advantage: μ_old -----------------------------------------
                (index, trajectory, judged), rounds = collect(
                    partial(draw, step, clock),
                    programs.fill,
                    informative,
                    rl.group_size,
                    rl.max_rounds,
                )
                with clock("reward"):
                    arrays = shard_rows(mesh, advantage_inputs(rl, judged))
                    advantages = programs.advantages(*arrays)

                # --- Score: π_old, and the routing to replay --------------------------------------
                with clock("score"):
                    train_batch, scored = make_batch(trajectory, advantages), None
                    if rl.objective.needs_score:
                        scored = programs.score(state.model, train_batch)
                        train_batch = with_old_policy(train_batch, scored)
                    if reference is not None:
                        logp_reference = programs.reference(reference, train_batch)
                        train_batch = dataclasses.replace(
                            train_batch, logp_reference=logp_reference
                        )
                    jax.block_until_ready(train_batch)

                # --- N updates: π_θ ---------------------------------------------------------------
                with clock("update"), jax.transfer_guard("disallow"):
                    updates: list[Metrics] = []
                    for mini_batch in programs.split(train_batch):
                        state, measured = programs.update(state, mini_batch)
                        updates.append(measured)
                    jax.block_until_ready(state)

            # --- Gates and metrics ----------------------------------------------------------------
            if scored is not None and step == start + 1:
                check_first_mini_batch(updates[0], rl.gate(experiment.model.dtype), step)
            check_finite(state, rl.max_skipped)
            values = clock.values() | host_metrics(
                rl, rounds, informative(judged), task.reward.right_at
            )
            measured = programs.summarize(updates, scored.metrics if scored else {})
            values |= diagnostics.as_floats(measured)
            values["gradient/skipped"] = float(jax.device_get(state.skipped))
            values["optimizer/learning_rate"] = float(programs.learning_rate(state))
            values["gradient_steps"] = float(step * rl.objective.mini_batches)
            values["throughput/tokens_per_s"] = values["response/tokens"] / values["time/step"]
            writer.write(step, values)
            writer.progress(step, values)
            failing = values["reward/failed_share"] > rl.max_failed_rewards
            if step % rl.show_every == 0 or step == 1 or failing:
                # Failed responses first; otherwise the first ones of the batch.
                chosen = np.argsort(judged.valid, stable=True)[:4] if failing else np.arange(4)
                chosen = chosen[: len(index)]
                shown = [task.train[int(i)] for i in index[chosen]]
                rows = sample_rows(shown, chosen, judged, advantages, train_batch, scored, task)
                writer.samples(step, rows)
                writer.show_sample(rows[0]["prompt"], rows[0]["response"], rows[0]["score"])
            check_failed_rewards(
                values["reward/failed_share"], rl.max_failed_rewards, step, task.reward.failures()
            )

            # --- Evaluation, checkpoint, and requests to stop -------------------------------------
            last, stopping = step == rl.steps, stop.agreed()
            evaluating = step % experiment.evaluation.every == 0 or last
            score = run_evaluation(step) if evaluating else None
            if step % rl.checkpoint_every == 0 or evaluating or stopping:
                checkpoints.save(step, to_parts(state) | {"key": key}, prompts, score)
            if stopping:
                raise Stopped(step, str(workdir))
    return state


def host_metrics(
    rl: Reinforcement,
    rounds: Sequence[Judged],
    informative: Bool[np.ndarray, "groups"],
    right_at: int | float,
) -> dict[str, float]:
    """Returns the host-side metrics of a step.

    Args:
      rl: settings of the run.
      rounds: every rollout batch that was drawn. Rewards are those of the first, because later
        rounds are selected.
      informative: the informative groups of the batch that is trained on.
      right_at: score from which a response is right.
    """
    return reward_metrics(rounds[0], rl.group_size, right_at) | {
        "reward/failed_share": failed_share(rounds),
        "response/tokens": float(sum(each.lengths.sum() for each in rounds)),
        "sampling/rounds": float(len(rounds)),
        "sampling/informative_share": float(informative.mean()),
    }


def profiled() -> ProfileSteps | None:
    """Returns the steps of `--profile_steps`, if any."""
    # `main` can be called directly, without flags.
    return parse_profile_steps(PROFILE_STEPS.value if flags.FLAGS.is_parsed() else "")


def check(experiment: Experiment, workdir: str) -> None:
    """Checks, in a dry run, what `main` would refuse before its first step."""
    profiled()
    rehearse(experiment, workdir, resumes=True)


def main(experiment: Experiment, workdir: str) -> None:
    """Trains, then writes the report."""
    profile_steps = profiled()
    if distributed.is_main():
        print(implementations(experiment))
    begin = time.time()
    train(experiment, workdir, profile_steps)
    if not distributed.is_main():
        return
    summary = {
        "name": pathlib.Path(workdir).name,
        "parameters": parameter_count(experiment.model),
        "devices": [str(device) for device in jax.devices()],
        "seconds": time.time() - begin,
    }
    pathlib.Path(workdir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    from jaxrl_stable.report import write_report  # matplotlib would take a quarter of the start

    print(f"report: {write_report(workdir)}")


__getattr__ = _moved.moved_names("jaxrl_stable.train")  # names that have moved


if __name__ == "__main__":
    program.run(main, program.EXPERIMENT._replace(check=check))
