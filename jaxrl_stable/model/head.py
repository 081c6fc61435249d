"""Output head: log-probabilities and entropy in float32, one chunk of columns at a time.

`[B, T, V]` is never materialised as a whole: each scan step computes the logits of one chunk, and
`jax.checkpoint` recomputes them in the backward pass. On a mesh, each device scores its own tokens.
The vocabulary may be sharded over `tensor`; then only sums over the vocabulary are communicated.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.sharding import STORED, gathered, mesh_axes, spec
from jaxrl_stable.sharding.layout import layout


class HeadOutput(NamedTuple):
    """Log-probability of each target, and entropy of the full distribution, both in nats."""

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


@jax.named_scope("head")
def logits(
    model: Transformer, hidden: Float[Array, "... D"], temperature: float | Float[Array, ""]
) -> Float[Array, "... V"]:
    """Returns float32 logits divided by the temperature, as used for sampling."""
    weight = gathered(model.head_weight().astype(hidden.dtype), model.head_axes())
    return _logits(hidden, weight, temperature)


@jax.named_scope("head")
def token_log_probs(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: float | Float[Array, ""] = 1.0,
) -> HeadOutput:
    """Scores `targets[b, t]` under the distribution that `hidden[b, t]` predicts.

        log π(y) = z_y − log Σ_v exp z_v,    H = log Σ_v exp z_v − Σ_v π(v) z_v

    Args:
      model: provides the head weight and `config.head_chunk`.
      hidden: final hidden states.
      targets: token ids to score.
      temperature: the sampler's temperature; both sides of an importance ratio must use the same.

    Returns:
      Log-probability and entropy per token.
    """
    weight, chunk = model.head_weight(), model.config.head_chunk
    where = layout(*targets.shape, sampling=False)
    if not where.shape:
        return _score(weight.astype(jnp.float32), hidden, targets, temperature, chunk)
    partition = spec(model.head_axes(), weight.shape, jax.sharding.get_abstract_mesh())
    stored, tensor = map(mesh_axes, partition)
    stored = tuple(a for a in stored if a in STORED)
    copied = tuple(a for a in where.rows + where.columns if a not in stored)

    def local(
        weight: Float[Array, "d v"], hidden: Float[Array, "b t D"], targets: Int[Array, "b t"]
    ) -> HeadOutput:  # sizes on one device
        if copied:  # so that gradients of the copies are summed once, not per chunk
            weight = jax.lax.pcast(weight, copied, to="varying")
        if stored:  # cast first to send half the bytes
            weight = weight.astype(hidden.dtype)
            weight = jax.lax.all_gather(weight, stored, tiled=True)
        return _score(weight.astype(jnp.float32), hidden, targets, temperature, chunk, tensor)

    return jax.shard_map(
        local,
        in_specs=(partition, where.spec(None), where.spec()),
        out_specs=HeadOutput(where.spec(), where.spec()),
    )(weight, hidden, targets)


def next_token_log_probs(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    first: int,
    temperature: float | Float[Array, ""] = 1.0,
) -> HeadOutput:
    """Scores `tokens[b, t]` for t ≥ `first` with the hidden state of column t − 1.

    Returns:
      Log-probability and entropy per token, 0 before column `first`. If columns are sharded over
      devices, they stay in place, and the columns before `first` are computed and discarded.
    """
    if layout(*tokens.shape, sampling=False).columns:
        scored = token_log_probs(model, hidden, jnp.roll(tokens, -1, axis=1), temperature)
        kept = jnp.arange(tokens.shape[1]) >= first
        return jax.tree.map(lambda x: jnp.where(kept, jnp.roll(x, 1, axis=1), 0.0), scored)
    scored = token_log_probs(model, hidden[:, first - 1 : -1], tokens[:, first:], temperature)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (first, 0))), scored)


def _score(
    weight: Float[Array, "D V"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: float | Float[Array, ""],
    chunk: int,
    tensor: tuple[str, ...] = (),
) -> HeadOutput:
    """Scores one device's tokens.

    Args:
      weight: head weight; float32, so that its gradient is summed over chunks in float32.
      hidden, targets, temperature: see `token_log_probs`.
      chunk: number of tokens whose logits are in memory at a time.
      tensor: mesh axes over which the vocabulary is sharded.
    """
    B, T, D = hidden.shape
    chunk = min(max(chunk // B, 1), T)
    padding = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    if tensor:
        hidden = jax.lax.pcast(hidden, tensor, to="varying")
        targets = targets - jax.lax.axis_index(tensor) * weight.shape[1]

    def over_vocabulary(x: Array) -> Array:
        return jax.lax.psum(x, tensor) if tensor else x

    @jax.checkpoint
    def score(
        _: None, columns: tuple[Float[Array, "B chunk D"], Int[Array, "B chunk"]]
    ) -> tuple[None, HeadOutput]:
        h, y = columns
        z = _logits(h, weight, temperature)
        highest = jax.lax.stop_gradient(z.max(-1))
        highest = jax.lax.pmax(highest, tensor) if tensor else highest
        normaliser = highest + jnp.log(
            over_vocabulary(jnp.sum(jnp.exp(z - highest[..., None]), axis=-1))
        )
        target = jnp.take_along_axis(z, y[..., None], axis=-1, mode="clip")[..., 0]
        if tensor:  # only one device holds the target
            target = jnp.where((y >= 0) & (y < z.shape[-1]), target, 0.0)
        expected = over_vocabulary(jnp.sum(jnp.exp(z - normaliser[..., None]) * z, axis=-1))
        return None, HeadOutput(over_vocabulary(target) - normaliser, normaliser - expected)

    columns = (
        jnp.moveaxis(hidden.reshape(B, -1, chunk, D), 1, 0),
        jnp.moveaxis(targets.reshape(B, -1, chunk), 1, 0),
    )
    _, output = jax.lax.scan(score, None, columns)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T], output)


def _logits(
    hidden: Float[Array, "... D"],
    weight: Float[Array, "D V"],
    temperature: float | Float[Array, ""],
) -> Float[Array, "... V"]:
    # The cast is inside the chunk so that the weight's gradient is summed over chunks in the
    # weight's own dtype.
    weight = weight.astype(hidden.dtype)
    product = jnp.einsum("...d,dv->...v", hidden, weight, preferred_element_type=jnp.float32)
    return product / temperature
