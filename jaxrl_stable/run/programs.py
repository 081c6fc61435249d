"""The jitted programs of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable import diagnostics
from jaxrl_stable.advantages import compares_groups, group_statistics, with_penalty
from jaxrl_stable.configs import Reinforcement
from jaxrl_stable.diagnostics import Metrics
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.sampler.quantize import quantize, sampling_copy
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.sampler.uncached import uncached_rollout
from jaxrl_stable.trainer.batch import TrainBatch, split
from jaxrl_stable.trainer.optimizer import TrainState, learning_rate, make_optimizer
from jaxrl_stable.trainer.score import Scored, score
from jaxrl_stable.trainer.update import update
from jaxrl_stable.trajectory import Trajectory, fill_rows


class Programs(NamedTuple):
    """Jitted programs of a run; each compiles once.

    Attributes:
      quantize: makes the sampler's (quantised) copy of the policy.
      rollout: samples responses to a batch of prompts.
      fill: `fill_rows`, for dynamic sampling.
      advantages: computes advantages from scores and length penalties.
      informative: marks the groups whose scores give an advantage.
      score: computes log π_old of a rollout batch.
      reference: computes log-probabilities under the reference policy of the KL term.
      update: takes one gradient step.
      split: splits a rollout batch into mini-batches.
      learning_rate: returns the learning rate of the last update.
      summarize: reduces the metrics of all mini-batches to scalars.
    """

    quantize: Callable[[Transformer], Transformer]
    rollout: Callable[..., Trajectory]
    fill: Callable[..., Trajectory]
    advantages: Callable[..., Array]
    informative: Callable[..., Array]
    score: Callable[..., Scored]
    reference: Callable[..., Array]
    update: Callable[..., tuple[TrainState, Metrics]]
    split: Callable[[TrainBatch], list[TrainBatch]]
    learning_rate: Callable[[TrainState], Array]
    summarize: Callable[[list[Metrics], Metrics], dict[str, Array]]


def make_programs(rl: Reinforcement, sampling: Sampling) -> Programs:
    """Binds the settings of a run to the library's functions and jits them."""
    parts = rl.objective.mini_batches
    passes = dict(
        micro_batch_size=rl.micro_batch_size, temperature=rl.temperature, packed=rl.packed
    )
    scoring = partial(score, mini_batches=parts, **passes)

    def mini_batches(batch: TrainBatch) -> list[TrainBatch]:
        stacked = split(batch, parts)
        return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(parts)]

    def summarize(updates: list[Metrics], scored: Metrics) -> dict[str, Array]:
        return diagnostics.finalize(diagnostics.merge(updates) | scored)

    copy, sample = sampling_copy, partial(rollout, sampling=sampling, at_a_time=rl.rollout_rows)
    if not rl.rollout_cache:  # the training program, with weights sharded as in training
        copy = quantize
        sample = partial(uncached_rollout, sampling=sampling, micro_batch_size=rl.micro_batch_size)
    step = partial(
        update,
        objective=rl.resolved_objective,
        optimizer=make_optimizer(rl.optimizer),
        **passes,
    )

    estimator = rl.objective.advantages

    def advantages(kept: Bool[Array, "B"], *judged: Array) -> Float[Array, "B"]:
        return jnp.where(kept, with_penalty(estimator, *judged), 0.0)

    def informative(
        kept: Bool[Array, "B"],
        scores: Float[Array, "B"],
        penalty: Float[Array, "B"],
        group_ids: Int[Array, "B"],
        *judged: Array,
    ) -> Bool[Array, "groups"]:
        # Only scores count, as in DAPO: an all-wrong group is not kept because its lengths differ.
        found = with_penalty(estimator, scores, jnp.zeros_like(penalty), group_ids, *judged)
        found = found.reshape(-1, rl.group_size)
        taught = (jnp.where(kept.reshape(found.shape), found, 0.0) != 0).any(-1)
        # Whitening can give equal rewards equal advantages other than 0. The estimator is tried
        # here, not in `make_programs`: programs for a pod are made where nothing can run.
        if compares_groups(estimator):
            statistics = group_statistics("informative", scores, group_ids, *judged)
            taught &= ~statistics.equal.reshape(found.shape).all(-1)
        return taught

    def reference(model: Transformer, batch: TrainBatch) -> Array:
        return scoring(model, batch, replay="none").logp_old  # with its own routing

    return Programs(
        quantize=jax.jit(partial(copy, format=rl.rollout_format)),
        rollout=jax.jit(sample),
        fill=jax.jit(fill_rows),
        advantages=jax.jit(advantages),
        informative=jax.jit(informative),
        score=jax.jit(partial(scoring, replay=rl.objective.replay)),
        reference=jax.jit(reference),
        update=jax.jit(step, donate_argnums=0),
        split=jax.jit(mini_batches),
        learning_rate=jax.jit(partial(learning_rate, config=rl.optimizer)),
        summarize=jax.jit(summarize),
    )
