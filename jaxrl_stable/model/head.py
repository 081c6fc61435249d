"""Output head: log-probabilities and entropy in float32, a chunk of columns at a time.

`[B, T, V]` is never held: the logits of a chunk live inside one scan step, and `jax.checkpoint`
recomputes them in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_stable.model.transformer import Transformer


class HeadOutput(NamedTuple):
    """Log-probability of each target (nats), and entropy of the full distribution (nats)."""

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]


def logits(
    model: Transformer, hidden: Float[Array, "... D"], temperature: float
) -> Float[Array, "... V"]:
    """Float32 logits of the distribution that is sampled: divided by the temperature."""
    return _logits(hidden, model.head_weight(), temperature)


def token_log_probs(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    temperature: float = 1.0,
) -> HeadOutput:
    """Scores `targets[b, t]` under the distribution that `hidden[b, t]` predicts.

        log π(y) = z_y − log Σ_v exp z_v,    H = log Σ_v exp z_v − Σ_v π(v) z_v

    Args:
      model: supplies the head weight and `config.head_chunk`.
      hidden: final hidden states.
      targets: token ids to score.
      temperature: the sampler's; both sides of an importance ratio must use the same.
    """
    B, T, D = hidden.shape
    chunk = min(max(model.config.head_chunk // B, 1), T)
    padding = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    weight = model.head_weight()

    @jax.checkpoint
    def score(_, columns):
        h, y = columns
        z = _logits(h, weight, temperature)
        normaliser = jax.nn.logsumexp(z, axis=-1)
        logp = jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - normaliser
        entropy = normaliser - jnp.sum(jnp.exp(z - normaliser[..., None]) * z, axis=-1)
        return None, HeadOutput(logp, entropy)

    columns = (
        jnp.moveaxis(hidden.reshape(B, -1, chunk, D), 1, 0),
        jnp.moveaxis(targets.reshape(B, -1, chunk), 1, 0),
    )
    _, output = jax.lax.scan(score, None, columns)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T], output)


def _logits(
    hidden: Float[Array, "... D"], weight: Float[Array, "D V"], temperature: float
) -> Float[Array, "... V"]:
    # Cast here, inside a chunk: the weight's gradient then adds up over chunks as it is stored.
    weight = weight.astype(hidden.dtype)
    product = jnp.einsum("...d,dv->...v", hidden, weight, preferred_element_type=jnp.float32)
    return product / temperature
