"""Samples from a run for the report, with the decisions of a step's last update per token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.objective import Objective
from jaxrl_stable.routing import overlap
from jaxrl_stable.study.config import Cell, Study
from jaxrl_stable.study.runs import Prepared, prepare, update_on
from jaxrl_stable.trainer.batch import split
from jaxrl_stable.trainer.forward import hidden_states, policy_log_probs
from jaxrl_stable.trainer.optimizer import TrainState, make_optimizer

PROBLEMS, RESPONSES = 2, 2  # shown per cell


def sample_rows(
    study: Study, cell: Cell, state: TrainState, key: Key[Array, ""], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns responses to a few problems, as seen by the last update of a step.

    Rows have the format of `run.samples.sample_rows`, plus the layers in which the routers differ
    and `clipped`: the tokens whose gradient the objective zeroes after N − 1 updates.

    Args:
      study: the study.
      cell: the cell of the run.
      state: state of the run.
      key: random key of the step.
      about: additional entries for every row.
    """
    found = jax.jit(
        partial(inspect, study=study, objective=cell.objective, rollout_format=cell.rollout_format)
    )(state, key)
    found = jax.device_get(found)
    P, rows = study.task.prompt_width, []
    group, responses = study.group_size, range(min(RESPONSES, study.group_size))
    problems = range(min(PROBLEMS, study.prompts))
    for i in (problem * group + response for problem in problems for response in responses):
        mask = found["mask"][i]
        layers = [np.flatnonzero(found["differs"][:, i, t - 1]) for t in np.flatnonzero(mask)]
        prompt = found["tokens"][i, :P][found["real"][i, :P]]
        tokens = study.task.decode(found["tokens"][i][mask])
        rows.append(
            {
                "prompt": " ".join(study.task.decode(prompt)),
                "response": " ".join(tokens),
                "score": float(found["rewards"][i]),
                "advantage": float(found["advantages"][i]),
                "tokens": [f"{token} " for token in tokens],
                "log_weight": found["log_weight"][i][mask].astype(float).round(5).tolist(),
                "clipped": found["clipped"][i][mask].tolist(),
                "differs": [layer.tolist() for layer in layers],
                **about,
            }
        )
    return rows


def inspect(
    state: TrainState,
    key: Key[Array, ""],
    *,
    study: Study,
    objective: Objective,
    rollout_format: str,
) -> dict[str, Array]:
    """Performs a step up to its last update; returns arrays for the last mini-batch's rows."""
    made = prepare(state.model, key, study, objective, rollout_format)
    differs = differing_layers(state.model, made)
    parts = split(made.batch, objective.mini_batches)
    earlier, last = jax.tree.map(lambda x: x[:-1], parts), jax.tree.map(lambda x: x[-1], parts)
    step = partial(
        update_on, study=study, objective=objective, optimizer=make_optimizer(study.optimizer)
    )
    state, _ = jax.lax.scan(step, state, earlier)
    replay = None if objective.replay == "none" else last.routing
    scored, _ = policy_log_probs(state.model, last, replay, study.temperature)
    arrays = last.logp_old, last.logp_rollout, last.advantages, last.response_mask
    loss, _ = objective.token_loss(scored.logp, *arrays)
    rows = last.tokens.shape[0]
    old = scored.logp if last.logp_old is None else last.logp_old
    return dict(
        tokens=last.tokens,
        real=last.real,
        mask=last.response_mask,
        rewards=made.rewards[-rows:],
        advantages=last.advantages,
        log_weight=old - last.logp_rollout,
        clipped=loss.clipped_high | loss.clipped_low,
        differs=differs[:, -rows:],
    )


def differing_layers(model: Transformer, made: Prepared) -> Array:
    """Marks, as `[L, B, T]`, where the training router and the sampler choose different experts."""
    _, router = hidden_states(model, made.batch, None)
    differs = overlap(made.sampled.experts, router.live) < 1.0
    return differs & jnp.asarray(made.sampled.valid)
