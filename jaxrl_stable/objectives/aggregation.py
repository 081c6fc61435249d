"""From per-token losses to a scalar, as (total, count) so that denominators can be global.

Micro-batches and devices add totals and counts and divide once. Rows without any response token
(padding rows) count nowhere. Rows whose tokens are all clipped do count: the clip mask silences
gradients, it does not shrink the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxrl_stable.importance import at_least_float32

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"
SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
TOKEN_MEAN = "token-mean"
MODES = (SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN)


def aggregate(
    loss: Float[Array, "B T"], mask: Bool[Array, "B T"], mode: str = SEQ_MEAN_TOKEN_SUM
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Reduces a token loss; the scalar is total / count, each summed over the whole mini-batch.

        seq-mean-token-sum    Σ_i Σ_t L        /  number of sequences   (eq. 7 of arXiv:2512.01374)
        seq-mean-token-mean   Σ_i Σ_t L / |y_i| /  number of sequences   (its length-norm ablation)
        token-mean            Σ_i Σ_t L        /  number of tokens

    Args:
      loss: per-token loss.
      mask: response tokens.
      mode: one of `MODES` (names as in verl's `agg_loss`).

    Raises:
      ValueError: unknown mode.
    """
    loss = jnp.where(mask, at_least_float32(loss), 0.0)
    tokens = mask.sum(-1, dtype=jnp.float32)
    sequences = (tokens > 0).sum(dtype=jnp.float32)
    if mode == SEQ_MEAN_TOKEN_SUM:
        return loss.sum(), sequences
    if mode == SEQ_MEAN_TOKEN_MEAN:
        return (loss.sum(-1) / jnp.maximum(tokens, 1.0)).sum(), sequences
    if mode == TOKEN_MEAN:
        return loss.sum(), tokens.sum()
    raise ValueError(f"aggregation {mode!r} is unknown; use one of {MODES}")
