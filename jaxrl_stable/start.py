"""Where a run begins: its newest checkpoint, other weights, a cold start, or nothing."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from functools import partial

import jax
from jaxtyping import Key

from jaxrl_stable import hf, sft
from jaxrl_stable.checkpoint import Checkpointer, load_model
from jaxrl_stable.configs import Experiment
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.optimizer import TrainState, from_parts, init_state, make_optimizer, to_parts
from jaxrl_stable.sharding import abstract_state, make_mesh, sharded_init, state_shardings
from jaxrl_stable.task import Task


def restore_or_start(
    experiment: Experiment,
    task: Task,
    workdir: pathlib.Path,
    checkpoints: Checkpointer,
    prompts: Iterator,
) -> tuple[TrainState, Key[jax.Array, ""], int]:
    """The newest checkpoint of this run, or its first state.

    Returns:
      The state, the key of the rollouts, and the number of finished steps.
    """
    mesh, optimizer = make_mesh(experiment.mesh), make_optimizer(experiment.reinforcement.optimizer)
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
    return start(first_policy(experiment, task, workdir)), jax.random.key(experiment.seed), 0


def first_policy(experiment: Experiment, task: Task, workdir: pathlib.Path) -> Transformer:
    """The weights that the run starts from: read, trained by imitation, or drawn.

    The same whenever it is called: a cold start is read from its own last checkpoint.
    """
    mesh = make_mesh(experiment.mesh)

    def fresh_model() -> Transformer:
        return init_model(experiment.model, experiment.seed)

    origin = pathlib.Path(experiment.init_from)
    if experiment.init_from and (origin / "config.json").exists():
        return hf.load(origin, mesh, experiment.model)
    if experiment.init_from:
        template = abstract_state(mesh, fresh_model)
        return load_model(origin / "checkpoints", experiment.model.architecture(), template)
    if experiment.cold_start is not None:
        return sft.train(experiment, task, workdir / "cold_start")
    return sharded_init(mesh, fresh_model)
