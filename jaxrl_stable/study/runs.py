"""A whole run as a pure function: a cold start, then steps of reinforcement learning.

The steps are the same as in `sft` and `train`, except that problems and rewards are arrays. A study
maps this function over runs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxrl_stable import _moved, diagnostics
from jaxrl_stable.array_tasks import ArrayTask, Problems
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.objective import Objective
from jaxrl_stable.routing import Routing
from jaxrl_stable.sampler.quantize import expanded, quantize
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.study.choice import Choice
from jaxrl_stable.study.config import ColdStart, Study
from jaxrl_stable.trainer.batch import TrainBatch, make_batch, split
from jaxrl_stable.trainer.optimizer import TrainState, init_state, make_optimizer
from jaxrl_stable.trainer.score import Scored, score, with_old_policy
from jaxrl_stable.trainer.supervised import supervised_update
from jaxrl_stable.trainer.update import update
from jaxrl_stable.trajectory import Trajectory

# The recorded curves of a run: name in the record -> metric.
CURVES = {
    "reward": "reward/mean",
    "length": "response/length",
    "kl": "mismatch/kl_k3_token_mean",
    "k1": "mismatch/kl_k1_token_mean",
    "entropy": "entropy",
    "clipped": "clip/region_share",
    "truncated": "weight/truncated_share",
    "weight_max": "weight/raw_max",
    "staleness_kl": "staleness/kl_k3_token_mean",
    "routing_agreement": "routing/agreement",
    "differing_tokens_share": "routing/differing_tokens_share",
    "gradient_norm": "gradient/norm",
}


class Prepared(NamedTuple):
    """A rollout, ready for the updates of a step.

    Attributes:
      batch: the training batch, with π_old if the objective needs it.
      scored: result of the score pass; None if there is no such pass.
      rewards: one reward per response.
      sampled: the sampler's routing, even if the updates replay a different one.
    """

    batch: TrainBatch
    scored: Scored | None
    rewards: Float[Array, "B"]
    sampled: Routing


class RunState(NamedTuple):
    """State of one run, and what distinguishes it from the other runs of the same program.

    Attributes:
      state: the policy and the optimizer's moments.
      key: random key for problems and samples.
      objective: index into the objectives of the program.
      learning_rate: learning rate of the updates.
    """

    state: TrainState
    key: Key[Array, ""]
    objective: Int[Array, ""]
    learning_rate: Float[Array, ""]


def demonstrations(
    task: ArrayTask, key: Key[Array, ""], count: int, slips: float
) -> dict[str, Array]:
    """Returns a batch for `supervised_update`: problems with the teacher's solutions."""
    of_problems, of_teacher = jax.random.split(key)
    problems = task.problems(of_problems, count)
    solutions, mask = task.solutions(of_teacher, problems, slips)
    real = jnp.concatenate([problems.mask, mask], axis=-1)
    return dict(
        tokens=jnp.concatenate([problems.prompts, solutions], axis=-1),
        segment_ids=real.astype(jnp.int32),
        positions=jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0),
        loss_mask=jnp.concatenate([jnp.zeros_like(problems.mask), mask], axis=-1),
    )


def policy(study: Study, key: Key[Array, ""]) -> Transformer:
    """Returns a policy with random weights.

    `experts="auto"` becomes "blocked" on every device: the kernels that "auto" selects on GPUs and
    TPUs cannot be mapped over runs.
    """
    config = study.model
    if config.experts == "auto":
        config = dataclasses.replace(config, experts="blocked")
    return Transformer(config, nnx.Rngs(key))


def cold_start(start: ColdStart, study: Study, key: Key[Array, ""]) -> Transformer:
    """Returns a policy trained from random weights to imitate the teacher."""
    of_weights, of_data = jax.random.split(key)
    optimizer = make_optimizer(start.optimizer)
    task = start.task or study.task

    def step(state: TrainState, number: Int[Array, ""]) -> tuple[TrainState, None]:
        key = jax.random.fold_in(of_data, number)
        batch = demonstrations(task, key, start.batch_size, start.slips)
        return supervised_update(state, batch, optimizer=optimizer)[0], None

    model = policy(study, of_weights)
    state, _ = jax.lax.scan(step, init_state(model, optimizer), jnp.arange(start.steps))
    return state.model


def begin(
    study: Study,
    model: Transformer,
    key: Key[Array, ""],
    objective: Int[Array, ""],
    learning_rate: Float[Array, ""],
) -> RunState:
    """Returns a run before its first step."""
    state = init_state(model, make_optimizer(study.optimizer))
    return RunState(state, key, objective, learning_rate)


def advance(
    run: RunState,
    first: Int[Array, ""],
    *,
    study: Study,
    objectives: tuple[Objective, ...],
    rollout_format: str,
) -> tuple[RunState, dict[str, Float[Array, "rollouts"]]]:
    """Advances a run to its next evaluation, which is a separate program shared by all cells.

    Args:
      run: the run so far.
      first: number of rollouts so far.
      study: the study; static.
      objectives: the objectives of all runs that share the program.
      rollout_format: number format of the sampler's weights.

    Returns:
      The run and its `CURVES`, one value per rollout.
    """
    choice = Choice(objectives, run.objective)
    rate = dataclasses.replace(study.optimizer, learning_rate=run.learning_rate)
    rollouts = study.interval // choice.mini_batches
    step = partial(
        reinforce,
        study=study,
        objective=choice,
        rollout_format=rollout_format,
        optimizer=make_optimizer(rate),
    )
    keys = jax.vmap(partial(jax.random.fold_in, run.key))(first + jnp.arange(rollouts))
    state, curves = jax.lax.scan(step, run.state, keys)
    return run._replace(state=state), curves


def reinforce(
    state: TrainState,
    key: Key[Array, ""],
    *,
    study: Study,
    objective: Objective | Choice,
    rollout_format: str,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Performs one rollout and its N updates; returns the new state and the step's `CURVES`."""
    made = prepare(state.model, key, study, objective, rollout_format)
    step = partial(update_on, study=study, objective=objective, optimizer=optimizer)
    state, metrics = jax.lax.scan(step, state, split(made.batch, objective.mini_batches))
    of_score = made.scored.metrics if made.scored else {}
    values = diagnostics.finalize(diagnostics.collapse(metrics) | of_score)
    values["reward/mean"] = made.rewards.mean()
    values["response/length"] = made.batch.response_mask.sum(-1).mean()
    return state, {name: values.get(m, jnp.zeros(())) for name, m in CURVES.items()}


def prepare(
    model: Transformer,
    key: Key[Array, ""],
    study: Study,
    objective: Objective | Choice,
    rollout_format: str,
) -> Prepared:
    """Samples, rewards and scores a rollout, up to the first update."""
    of_problems, of_samples = jax.random.split(key)
    count = study.prompts * objective.mini_batches
    problems = repeated(study.task.problems(of_problems, count), study.group_size)
    sampler = expanded(quantize(model, rollout_format))
    trajectory, rewards = sample(sampler, problems, of_samples, study)
    advantages = objective.advantages(
        rewards,
        jnp.repeat(jnp.arange(count), study.group_size),
        jnp.ones_like(rewards, bool),
        trajectory.response_mask.sum(-1),
    )
    batch, scored = make_batch(trajectory, advantages), None
    if objective.needs_score:
        passes = dict(micro_batch_size=_mini_batch(study), temperature=study.temperature)
        scored = score(model, batch, replay=objective.replay, **passes)
        batch = with_old_policy(batch, scored)
    return Prepared(batch, scored, rewards, trajectory.routing)


def update_on(
    state: TrainState,
    batch: TrainBatch,
    *,
    study: Study,
    objective: Objective | Choice,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, diagnostics.Metrics]:
    """Calls `update` with the settings of a study."""
    return update(
        state,
        batch,
        objective=objective,
        optimizer=optimizer,
        micro_batch_size=_mini_batch(study),
        temperature=study.temperature,
    )


def sample(
    model: Transformer, problems: Problems, key: Key[Array, ""], study: Study
) -> tuple[Trajectory, Float[Array, "B"]]:
    """Samples one response per problem; returns the rollout and its rewards."""
    task = study.task
    sampling = Sampling(
        max_tokens=task.max_tokens,
        temperature=study.temperature,
        stop_ids=task.stop_ids,
        pad_id=task.pad_id,
    )
    trajectory = rollout(model, problems.prompts, problems.mask, key, sampling)
    responses = (
        x[:, trajectory.prompt_width :] for x in (trajectory.tokens, trajectory.response_mask)
    )
    return trajectory, task.reward(problems, *responses)


def heldout_score(model: Transformer, study: Study) -> Float[Array, ""]:
    """Returns the mean reward on held-out problems, with the same random numbers every time."""
    of_problems, of_samples = jax.random.split(jax.random.key(0))
    problems = study.task.problems(of_problems, study.heldout_problems, heldout=True)
    _, rewards = sample(model, repeated(problems, study.heldout_samples), of_samples, study)
    return rewards.mean()


def repeated(problems: Problems, times: int) -> Problems:
    """Repeats each problem `times` times in a row."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), problems)


def _mini_batch(study: Study) -> int:
    return study.prompts * study.group_size


__getattr__ = _moved.moved_names("jaxrl_stable.study.runs")  # names that have moved
