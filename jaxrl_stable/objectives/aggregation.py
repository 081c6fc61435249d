"""Reduction of per-token losses to (total, count), so that denominators can be global.

Totals and counts are summed over micro-batches and devices and divided once, at the end. Rows
without response tokens (padding rows) are not counted. Rows whose tokens are all clipped are
counted: clipping zeroes gradients but does not shrink the batch.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import at_least_float32
from jaxrl_stable.objectives.token_loss import check_same_shape

SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"
SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"
TOKEN_MEAN = "token-mean"
TOKEN_SUM = "token-sum"
MODES = (
    SEQ_MEAN_TOKEN_SUM,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
    TOKEN_MEAN,
    TOKEN_SUM,
)


def aggregate(
    loss: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    mode: str = SEQ_MEAN_TOKEN_SUM,
    horizon: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Reduces a per-token loss to a total and the count to divide it by.

        seq-mean-token-sum        Σ_i Σ_t L         / number of sequences   (MiniRL)
        seq-mean-token-mean       Σ_i Σ_t L / |y_i| / number of sequences   (GRPO; MiniRL ablation)
        seq-mean-token-sum-norm   Σ_i Σ_t L / H     / number of sequences   (Dr.GRPO)
        token-mean                Σ_i Σ_t L         / number of tokens      (DAPO)
        token-sum                 Σ_i Σ_t L, undivided: the count is 0 (see `divide`)

    Args:
      loss: per-token loss.
      mask: response tokens.
      mode: one of `MODES` (names as in verl's `agg_loss`).
      horizon: H, a constant length, for example the maximum response length.

    Returns:
      (total, count). Sum each over the whole mini-batch, then call `divide`.

    Raises:
      ValueError: if the mode is unknown, "seq-mean-token-sum-norm" has no positive horizon, or the
        shapes differ.

    Example:
      >>> loss = jnp.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
      >>> mask = jnp.array([[True, True, False], [True, False, False]])
      >>> for mode in ("seq-mean-token-sum", "seq-mean-token-mean", "token-mean"):
      ...     total, count = aggregate(loss, mask, mode)
      ...     print(float(total), float(count), float(divide(total, count)))
      6.0 2.0 3.0
      4.5 2.0 2.25
      6.0 3.0 2.0
    """
    check_same_shape("aggregate", "B T", loss=loss, mask=mask)
    loss = jnp.where(mask, at_least_float32(loss), 0.0)
    tokens = mask.sum(-1, dtype=loss.dtype)
    sequences = (tokens > 0).sum(dtype=loss.dtype)
    if mode == SEQ_MEAN_TOKEN_SUM:
        return loss.sum(), sequences
    if mode == SEQ_MEAN_TOKEN_MEAN:
        return (loss.sum(-1) / jnp.maximum(tokens, 1.0)).sum(), sequences
    if mode == SEQ_MEAN_TOKEN_SUM_NORM:
        if horizon is None or horizon <= 0:
            raise ValueError(
                f"aggregation {mode!r} divides by a constant length but horizon is {horizon}; "
                "set it to a positive length, such as the maximum response length"
            )
        return loss.sum() / horizon, sequences
    if mode == TOKEN_MEAN:
        return loss.sum(), tokens.sum()
    if mode == TOKEN_SUM:
        return loss.sum(), jnp.zeros_like(sequences)
    raise ValueError(f"aggregation {mode!r} is unknown; use one of {MODES}")


def divide(total: Float[Array, "*n"], count: Float[Array, ""]) -> Float[Array, "*n"]:
    """Returns total / count, or the total itself if the count is 0.

    `total` may also be the gradient of a total; the result is then the gradient of the mean.
    """
    return total / jnp.where(count > 0, count, 1.0)
