"""Rollout: prefill, then sample token by token until every row is done, in one pure function.

The sampler runs the same block code as the trainer. It records its own log-probability of each
sampled token, and the experts of each token fed to the model.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_stable.checks import field_types, positive, within
from jaxrl_stable.model import head
from jaxrl_stable.model.cache import Cache, empty_cache
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.routing import Routing, expert_dtype
from jaxrl_stable.sharding import ROWS, constrain
from jaxrl_stable.sharding.rows import cut_rows
from jaxrl_stable.trajectory import Trajectory, join_trajectories


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. They are static, so changing them recompiles the program.

    Attributes:
      max_tokens: maximum response length, EOS included.
      temperature: divisor of the logits, here and in the trainer; 0 is greedy (for evaluation).
      top_k: number of most likely tokens to keep; 0 keeps all.
      top_p: probability mass to keep, most likely tokens first; 1 keeps all.
      stop_ids: tokens that end a response.
      pad_id: token that fills the columns after a response.

    With top_k or top_p, the recorded log-probability still refers to the untruncated distribution,
    to match the trainer's. The sample then comes from a different distribution: the importance
    weight lacks a factor S (the probability mass kept), expectations cover only the kept tokens,
    and the other tokens get no gradient. Training is unbiased only without top_k and top_p; the
    temperature does not matter.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        field_types(self)
        positive(self, "max_tokens")
        within(self, "temperature", "top_k", at_least=0)
        within(self, "top_p", above=0, at_most=1)


class _Decode(NamedTuple):
    """State of the decode loop; all columns before `column` have been written."""

    column: Int[Array, ""]
    hidden: Float[Array, "B D"]
    cache: Cache
    tokens: Int[Array, "B T"]
    logp: Float[Array, "B T"]
    response: Bool[Array, "B T"]
    experts: Int[Array, "L B T K"]
    fed: Bool[Array, "B T"]
    active: Bool[Array, "B"]
    finished: Bool[Array, "B"]


def rollout(
    model: Transformer,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: Key[Array, ""],
    sampling: Sampling,
    at_a_time: int | None = None,
) -> Trajectory:
    """Samples one response per row.

    Row b draws from `fold_in(fold_in(key, b), column)`, so its samples do not depend on other rows,
    on padding rows, on the sharding of rows, or on `at_a_time`.

    Args:
      model: the sampling policy μ (possibly a quantised copy).
      prompts: left-padded prompts.
      prompt_mask: False on padding. A row that is False throughout is a padding row and samples
        nothing.
      key: typed PRNG key.
      sampling: sampling settings, static.
      at_a_time: number of rows that share one cache; all rows by default. Must divide B. Chunks of
        this size run one after another.

    Returns:
      Prompts, responses, and the sampler's records of both.
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(prompts.shape[0]))
    if at_a_time is None or at_a_time == prompts.shape[0]:
        return _sample_rows(model, prompts, prompt_mask, keys, sampling)
    lots = prompts.shape[0] // at_a_time
    cut = jax.tree.map(lambda x: cut_rows(x, lots, over=ROWS), (prompts, prompt_mask, keys))
    sampled = jax.lax.map(lambda rows: _sample_rows(model, *rows, sampling), cut)
    return join_trajectories(sampled, over=ROWS)


def _sample_rows(
    model: Transformer,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    row_keys: Key[Array, "B"],
    sampling: Sampling,
) -> Trajectory:
    """Prefills and decodes rows that share one cache."""
    config = model.config
    B, P = prompts.shape
    T = P + sampling.max_tokens
    lengths = prompt_mask.sum(-1)
    layers, k = config.num_moe_layers, config.num_experts_per_token

    def sample(state: _Decode) -> _Decode:
        """Draws the token of `column` from the preceding hidden state."""
        keys = jax.vmap(lambda row: jax.random.fold_in(row, state.column))(row_keys)
        logits = head.logits(model, state.hidden, sampling.temperature or 1.0)
        token = jax.vmap(partial(draw, sampling=sampling))(keys, logits)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        stop = jnp.isin(token, jnp.array(sampling.stop_ids, token.dtype))
        write = lambda array, x: jax.lax.dynamic_update_slice(  # noqa: E731
            array, x[:, None].astype(array.dtype), (0, state.column)
        )
        return state._replace(
            column=state.column + 1,
            tokens=write(state.tokens, jnp.where(state.active, token, sampling.pad_id)),
            logp=write(state.logp, jnp.where(state.active, logp, 0.0)),
            response=write(state.response, state.active),
            active=state.active & ~stop,
            finished=state.finished | (state.active & stop),
        )

    def feed(state: _Decode) -> _Decode:
        """Feeds the newest token of the active rows to the model; other rows are padding."""
        last = state.column - 1
        tokens = jax.lax.dynamic_slice(state.tokens, (0, last), (B, 1))
        active = state.active[:, None]
        positions = (lengths + last - P)[:, None]
        output = model(tokens, positions, active.astype(jnp.int32), cache=state.cache)
        return state._replace(
            hidden=output.hidden[:, 0],
            cache=output.cache,
            experts=jax.lax.dynamic_update_slice(
                state.experts, output.router.experts, (0, 0, last, 0)
            ),
            fed=jax.lax.dynamic_update_slice(state.fed, active, (0, last)),
        )

    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=-1) - 1, 0)
    cache = empty_cache(config, B, P)  # prompts need not attend to empty response columns
    output = model(prompts, positions, prompt_mask.astype(jnp.int32), cache=cache)
    responses = ((0, 0), (0, sampling.max_tokens))
    experts = jnp.zeros((layers, B, T, k), expert_dtype(config.num_experts))
    state = _Decode(
        column=jnp.int32(P),
        hidden=output.hidden[:, -1],
        cache=_shard_cache(output.cache.widen(T)),
        tokens=jnp.pad(
            jnp.where(prompt_mask, prompts, sampling.pad_id),
            responses,
            constant_values=sampling.pad_id,
        ),
        logp=jnp.zeros((B, T), jnp.float32),
        response=jnp.zeros((B, T), bool),
        experts=constrain(
            jax.lax.dynamic_update_slice(experts, output.router.experts, (0, 0, 0, 0)), None, ROWS
        ),
        fed=jnp.pad(prompt_mask, responses),
        active=lengths > 0,
        finished=jnp.zeros(B, bool),
    )
    state = jax.lax.while_loop(
        lambda s: (s.column < T) & anywhere(s.active), lambda s: sample(feed(s)), sample(state)
    )
    rows = partial(jax.tree.map, lambda x: constrain(x, ROWS))
    return Trajectory(
        **rows(
            dict(
                tokens=state.tokens,
                real=jnp.pad(prompt_mask, responses) | state.response,
                response_mask=state.response,
                logp_rollout=state.logp,
                finished=state.finished,
            )
        ),
        routing=Routing(constrain(state.experts, None, ROWS), rows(state.fed)),
        prompt_width=P,
    )


@jax.custom_batching.custom_vmap
def anywhere(active: Bool[Array, "B"]) -> Bool[Array, ""]:
    """Returns whether any row is active; under `jax.vmap`, any row of any batch member.

    If batch members left a loop at different times, the loop would copy its whole state in every
    iteration to preserve the finished ones. Instead all of them continue together, and finished
    rows sample nothing.
    """
    return active.any()


@anywhere.def_vmap
def _anywhere_of_all(
    axis_size: int, in_batched: list[bool], active: Bool[Array, "n B"]
) -> tuple[Bool[Array, ""], bool]:
    return anywhere(active), False


def _shard_cache(cache: Cache) -> Cache:
    """Shards the rows of a cache over all devices and its heads over `tensor`."""
    heads = None, ROWS, None, "tensor"
    return dataclasses.replace(
        cache,
        keys=constrain(cache.keys, *heads),
        values=constrain(cache.values, *heads),
        segment_ids=constrain(cache.segment_ids, ROWS),
    )


def draw(key: Key[Array, ""], logits: Float[Array, "V"], *, sampling: Sampling) -> Int[Array, ""]:
    """Draws one token from the (possibly truncated) distribution."""
    if sampling.temperature == 0:
        return jnp.argmax(logits)
    if sampling.top_k:
        smallest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][-1]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        ranked = jnp.sort(logits, descending=True)
        mass = jax.nn.softmax(ranked)
        # Keep a token if the mass ranked before it is below p; the first is always kept.
        kept = jnp.cumsum(mass) - mass < sampling.top_p
        smallest = jnp.min(jnp.where(kept, ranked, jnp.inf))
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
