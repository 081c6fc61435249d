"""Sampling with the training program itself: same shapes, no cache, bitwise equal results.

Every new token runs whole rows through the model again, which costs about `max_tokens` passes of
`score`. Use this for debugging, and for experiments that need a mismatch of exactly 0 between
sampler and trainer; the comment at the top of experiments/exact.gin lists the other conditions.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jaxrl_stable.model import head
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.routing import Routing, expert_dtype
from jaxrl_stable.sampler.rollout import Sampling, draw
from jaxrl_stable.sharding import BATCH
from jaxrl_stable.sharding.rows import cut_rows
from jaxrl_stable.trainer.forward import hidden_states, response_log_probs
from jaxrl_stable.trajectory import Trajectory, join_trajectories


class _Decode(NamedTuple):
    """State of the decode loop; all columns before `column` have been written."""

    column: Int[Array, ""]
    active: Bool[Array, "B"]
    trajectory: Trajectory


def uncached_rollout(
    model: Transformer,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: Key[Array, ""],
    sampling: Sampling,
    micro_batch_size: int,
) -> Trajectory:
    """Samples one response per row, with the same random numbers as `rollout`.

    Args:
      model, prompts, prompt_mask, key, sampling: see `rollout`.
      micro_batch_size: number of rows per pass. It must equal the micro-batch size of `score` and
        `update`, so that shapes are the same.

    Returns:
      Prompts, responses, and the sampler's records of both.
    """
    B = prompts.shape[0]
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
    parts = B // micro_batch_size
    cut = jax.tree.map(lambda x: cut_rows(x, parts), (prompts, prompt_mask, keys))
    sampled = jax.lax.map(lambda rows: _sample(model, *rows, sampling), cut)
    return join_trajectories(sampled, over=BATCH)


def _sample(
    model: Transformer,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    keys: Key[Array, "B"],
    sampling: Sampling,
) -> Trajectory:
    """Samples one micro-batch; each pass sees the tokens so far, with later columns as padding."""
    config, temperature = model.config, sampling.temperature or 1.0
    (B, P), T = prompts.shape, prompts.shape[1] + sampling.max_tokens
    columns = jnp.arange(T)

    def step(state: _Decode) -> _Decode:
        """Draws and scores the token of `column`, from one pass over the preceding tokens."""
        column, active, past = state
        hidden, router = hidden_states(model, past, replay=None)
        logits = head.logits(model, hidden[:, column - 1], temperature)
        draws = jax.vmap(lambda row: jax.random.fold_in(row, column))(keys)
        token = jax.vmap(partial(draw, sampling=sampling))(draws, logits)
        new = (columns == column) & active[:, None]
        stop = active & jnp.isin(token, jnp.array(sampling.stop_ids, token.dtype))
        now = dataclasses.replace(
            past,
            tokens=jnp.where(new, token[:, None], past.tokens),
            real=past.real | new,
            response_mask=past.response_mask | new,
            # The pass reproduces the experts of earlier tokens.
            routing=Routing(router.experts, past.routing.valid | (past.real & active[:, None])),
            finished=past.finished | stop,
        )
        # Score all columns, although only one is new: the shapes of `score` give its exact bits.
        logp = response_log_probs(model, hidden, now, temperature).logp
        now = dataclasses.replace(now, logp_rollout=jnp.where(new, logp, past.logp_rollout))
        return _Decode(column + 1, active & ~stop, now)

    behind = ((0, 0), (0, sampling.max_tokens))
    routing = (config.num_moe_layers, B, T, config.num_experts_per_token)
    prompt = Trajectory(
        tokens=jnp.pad(
            jnp.where(prompt_mask, prompts, sampling.pad_id),
            behind,
            constant_values=sampling.pad_id,
        ),
        real=jnp.pad(prompt_mask, behind),
        response_mask=jnp.zeros((B, T), bool),
        logp_rollout=jnp.zeros((B, T), jnp.float32),
        routing=Routing(
            jnp.zeros(routing, expert_dtype(config.num_experts)), jnp.zeros((B, T), bool)
        ),
        finished=jnp.zeros(B, bool),
        prompt_width=P,
    )
    state = _Decode(jnp.int32(P), prompt_mask.any(-1), prompt)
    return jax.lax.while_loop(lambda s: (s.column < T) & s.active.any(), step, state).trajectory
