"""Cold start: supervised training on demonstrations before reinforcement."""

from __future__ import annotations

import pathlib
import time
from functools import partial

import jax
from jax.sharding import Mesh

from jaxrl_stable import diagnostics, distributed
from jaxrl_stable.checkpoint import Checkpointer
from jaxrl_stable.configs import Experiment, Supervised
from jaxrl_stable.data import open_source, packed_iterator
from jaxrl_stable.distributed.preemption import Stopped, StopRequest
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.run.fingerprint import fingerprint
from jaxrl_stable.run.gates import check_finite
from jaxrl_stable.run.identity import settings_of_origin
from jaxrl_stable.run.origin import load_origin, write_record
from jaxrl_stable.run.task import Task
from jaxrl_stable.run.writer import open_writer
from jaxrl_stable.sharding import abstract_state, shard_rows, sharded_init, state_shardings
from jaxrl_stable.trainer.optimizer import (
    TrainState,
    from_parts,
    init_state,
    learning_rate,
    make_optimizer,
    to_parts,
)
from jaxrl_stable.trainer.supervised import supervised_update

# Console columns; see `writer.COLUMNS`.
COLUMNS = (
    ("loss", "{:.3f}", ("sft/loss",)),
    ("entropy", "{:.3f}", ("sft/entropy",)),
    ("s/step", "{:.3f}", ("time/step",)),
)
LOG_EVERY = 10  # steps


def cold_start_of(experiment: Experiment) -> Supervised:
    """Returns `Experiment.cold_start`; raises ValueError if the experiment has none."""
    if experiment.cold_start is None:
        raise ValueError("Experiment.cold_start is missing; bind it to @configs.Supervised()")
    return experiment.cold_start


def run_cold_start(
    experiment: Experiment, task: Task, mesh: Mesh, workdir: str | pathlib.Path
) -> Transformer:
    """Trains the model of an experiment on demonstrations, resuming from `workdir`.

    It starts from the weights of `Experiment.init_from`, or from random ones.

    Args:
      experiment: see `Experiment.cold_start`.
      task: problems, tokenizer and template.
      mesh: device mesh of the run.
      workdir: directory of the cold start.

    Returns:
      The trained policy.

    Raises:
      ValueError: if the experiment has no cold start, or if its checkpoint started from another
        `Experiment.init_from`.
      Stopped: if the run was asked to stop; the state is saved.
    """
    config = cold_start_of(experiment)
    optimizer = make_optimizer(config.optimizer)
    source = task.demonstrations
    if source is None:
        source = task.train if config.demonstrations is None else open_source(config.demonstrations)
    identity = f"{source!r} with {task.identity}, seed {experiment.seed}"
    batches = packed_iterator(
        source,
        task.tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        seed=experiment.seed,
        template=task.template,
    )
    rate_fn = jax.jit(partial(learning_rate, config=config.optimizer))
    step_fn = jax.jit(partial(supervised_update, optimizer=optimizer), donate_argnums=0)

    def init() -> TrainState:
        return init_state(init_model(experiment.model, experiment.seed), optimizer)

    def first_state() -> TrainState:
        if not experiment.init_from:
            return sharded_init(mesh, init)
        policy = load_origin(experiment, mesh)
        loaded = fingerprint(policy, mesh)
        if distributed.is_main():
            write_record(pathlib.Path(workdir), init_from=experiment.init_from, loaded=loaded)
        shardings = state_shardings(mesh, template)
        return jax.jit(partial(init_state, optimizer=optimizer), out_shardings=shardings)(policy)

    architecture = experiment.model.architecture()
    with (
        jax.set_mesh(mesh),
        Checkpointer(
            pathlib.Path(workdir, "checkpoints"),
            architecture,
            keep=1,
            data=identity,
            settings=settings_of_origin(experiment),
        ) as checkpoints,
        StopRequest() as stop,
    ):
        template = abstract_state(mesh, init)
        restored = checkpoints.restore(to_parts(template), batches)
        state = from_parts(restored) if restored else first_state()
        start = int(state.step)
        if start >= config.steps:
            return state.model
        with open_writer(
            workdir,
            start_step=start,
            total_steps=config.steps,
            columns=COLUMNS,
            wandb_project=experiment.wandb_project,
            config=experiment,
        ) as writer:
            clock, logged = time.perf_counter(), start
            for step in range(start + 1, config.steps + 1):
                state, metrics = step_fn(state, shard_rows(mesh, next(batches)))
                last = step == config.steps
                if step % LOG_EVERY == 0 or last:
                    values = diagnostics.as_floats(diagnostics.finalize(metrics))
                    values["gradient/skipped"] = float(state.skipped)
                    values["optimizer/learning_rate"] = float(rate_fn(state))
                    values["time/step"] = (time.perf_counter() - clock) / (step - logged)
                    clock, logged = time.perf_counter(), step
                    check_finite(state, limit=10)
                    writer.write(step, values)
                    writer.progress(step, values)
                stopping = stop.agreed()
                if step % config.checkpoint_every == 0 or last or stopping:
                    checkpoints.save(step, to_parts(state), batches)
                if stopping:
                    raise Stopped(step, str(workdir))
    return state.model
