"""Initial state of a run: its newest checkpoint, loaded weights, a cold start or random weights."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from functools import partial

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxrl_stable.checkpoint import Checkpointer
from jaxrl_stable.configs import Experiment
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.run.cold_start import run_cold_start
from jaxrl_stable.run.origin import load_origin
from jaxrl_stable.run.reference import keep_start
from jaxrl_stable.run.task import Task
from jaxrl_stable.sharding import abstract_state, state_shardings
from jaxrl_stable.trainer.optimizer import (
    TrainState,
    from_parts,
    init_state,
    make_optimizer,
    to_parts,
)


def restore_or_start(
    experiment: Experiment,
    task: Task,
    mesh: Mesh,
    workdir: pathlib.Path,
    checkpoints: Checkpointer,
    prompts: Iterator,
) -> tuple[TrainState, Key[Array, ""], int]:
    """Restores the newest checkpoint of this run, or creates its first state.

    The first start records the run's origin (`run.origin`). Later starts do not need the origin,
    and never train the cold start further.

    Args:
      experiment: the experiment.
      task: problems and tokenizer, for a cold start.
      mesh: device mesh of the run.
      workdir: directory of the run.
      checkpoints: checkpoints of the run.
      prompts: iterator of prompts; moved to the position of the checkpoint.

    Returns:
      The state, the key of the rollouts, and the number of finished steps.

    Raises:
      ValueError, FileNotFoundError: if the checkpoint is from another run, or weights are missing.
    """
    optimizer = make_optimizer(experiment.reinforcement.optimizer)
    template = abstract_state(
        mesh, lambda: init_state(init_model(experiment.model, experiment.seed), optimizer)
    )
    key_template = abstract_state(mesh, lambda: jax.random.key(0))
    restored = checkpoints.restore(to_parts(template) | {"key": key_template}, prompts)
    if restored:
        return from_parts(restored), restored["key"], checkpoints.steps[-1]
    start = jax.jit(
        partial(init_state, optimizer=optimizer), out_shardings=state_shardings(mesh, template)
    )
    policy = first_policy(experiment, task, mesh, workdir)
    keep_start(experiment, policy, mesh, workdir)
    return start(policy), jax.random.key(experiment.seed), 0


def first_policy(
    experiment: Experiment, task: Task, mesh: Mesh, workdir: pathlib.Path
) -> Transformer:
    """Returns the weights of the first step: loaded or random, after the cold start if any.

    Until the run has a checkpoint, every call returns the same weights: a finished cold start is
    read from its last checkpoint.
    """
    if experiment.cold_start is not None:
        return run_cold_start(experiment, task, mesh, workdir / "cold_start")
    return load_origin(experiment, mesh)
