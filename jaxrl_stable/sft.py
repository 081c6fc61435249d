"""Cold start: supervised training on prompt-answer pairs, packed, before reinforcement.

python -m jaxrl_stable.sft --gin_file=… --workdir=runs/cold_start
"""

from __future__ import annotations

import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxrl_stable import diagnostics, program
from jaxrl_stable.checkpoint import Checkpointer
from jaxrl_stable.configs import Experiment
from jaxrl_stable.data import packed_iterator
from jaxrl_stable.diagnostics import Mean, Metrics
from jaxrl_stable.gates import check_finite
from jaxrl_stable.metrics import open_writer
from jaxrl_stable.model.head import next_token_log_probs
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.optimizer import (
    TrainState,
    apply_gradients,
    from_parts,
    init_state,
    make_optimizer,
    to_parts,
)
from jaxrl_stable.preemption import Stopped, StopRequest
from jaxrl_stable.sharding import abstract_state, make_mesh, shard_rows, sharded_init
from jaxrl_stable.task import Task, load_task, open_source


def supervised_update(
    state: TrainState, batch: dict[str, jax.Array], *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One step on packed rows: mean negative log-likelihood over the answers' tokens.

        L = − Σ m_t log π_θ(y_t | y_<t) / Σ m_t

    Args:
      state: training state.
      batch: `tokens`, `segment_ids`, `positions` [B, T] and `loss_mask` [B, T], as packed.
      optimizer: static.
    """
    mask = batch["loss_mask"]

    def loss(model: Transformer):
        output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        scored = next_token_log_probs(model, output.hidden, batch["tokens"], 1)
        nll = diagnostics.masked_mean(-scored.logp, mask)
        metrics = {
            "sft/loss": nll,
            "sft/entropy": diagnostics.masked_mean(scored.entropy, mask),
            **diagnostics.load_metrics(
                output.router.load, output.router.confidence, batch["segment_ids"] > 0
            ),
        }
        return nll.value(), metrics

    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.model)
    state, norm = apply_gradients(state, gradients, optimizer)
    return state, metrics | {"gradient/norm": Mean(norm, jnp.ones(()))}


def train(experiment: Experiment, task: Task, workdir: str | pathlib.Path) -> Transformer:
    """Trains the model of an experiment on its cold start, resuming where `workdir` stopped.

    Raises:
      ValueError: the experiment has no cold start.
      Stopped: SIGTERM came; the state is saved.
    """
    config = experiment.cold_start
    if config is None:
        raise ValueError("Experiment.cold_start is missing; bind it to @configs.Supervised()")
    mesh, optimizer = make_mesh(experiment.mesh), make_optimizer(config.optimizer)
    experiment.check_mesh(mesh)
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
    step_fn = jax.jit(partial(supervised_update, optimizer=optimizer), donate_argnums=0)

    def init() -> TrainState:
        return init_state(init_model(experiment.model, experiment.seed), optimizer)

    architecture = experiment.model.architecture()
    with (
        jax.set_mesh(mesh),
        Checkpointer(
            pathlib.Path(workdir, "checkpoints"), architecture, keep=1, data=identity
        ) as checkpoints,
        StopRequest() as stop,
    ):
        template = abstract_state(mesh, init)
        restored = checkpoints.restore(to_parts(template), batches)
        state = from_parts(restored) if restored else sharded_init(mesh, init)
        start = int(state.step)
        with open_writer(workdir, start_step=start, total_steps=config.steps) as writer:
            clock = time.perf_counter()
            for step in range(start + 1, config.steps + 1):
                state, metrics = step_fn(state, shard_rows(mesh, next(batches)))
                last = step == config.steps
                if step % 10 == 0 or last:
                    values = diagnostics.as_floats(diagnostics.finalize(metrics))
                    values["gradient/skipped"] = float(state.skipped)
                    values["time/step"] = (time.perf_counter() - clock) / 10
                    clock = time.perf_counter()
                    check_finite(state, limit=10)
                    writer.write(step, values)
                    writer.progress(step, values | {"entropy": values["sft/entropy"]})
                stopping = stop.agreed()
                if step % config.checkpoint_every == 0 or last or stopping:
                    checkpoints.save(step, to_parts(state), batches)
                if stopping:
                    raise Stopped(step, str(workdir))
    return state.model


def main(experiment: Experiment, workdir: str) -> None:
    with load_task(experiment, workdir) as task:
        train(experiment, task, workdir)


if __name__ == "__main__":
    program.run(main)
