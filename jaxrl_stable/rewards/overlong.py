"""DAPO's soft penalty for responses near the length limit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num


def overlong_penalty(
    lengths: Sequence[int] | Num[np.ndarray, "B"], limit: int, buffer: int
) -> Float[np.ndarray, "B"]:
    """Returns the penalty to add to each reward (arXiv:2503.14476, eq. 13).

        0                               |y| ≤ limit − buffer
        (limit − buffer − |y|) / buffer in between
        −1                              |y| > limit

    DAPO uses limit 20,480 and buffer 4,096.

    Args:
      lengths: response lengths |y| in tokens.
      limit: L_max.
      buffer: L_cache; with 0, no response within the limit is penalised.

    Returns:
      Penalty of each response, in [−1, 0].

    Raises:
      ValueError: if the buffer is negative or larger than the limit.
    """
    if not 0 <= buffer <= limit:
        raise ValueError(f"overlong_penalty: buffer is {buffer}; use 0 to limit ({limit})")
    lengths = np.asarray(lengths, np.float32)
    over = np.maximum(lengths - (limit - buffer), 0.0)
    return np.where(lengths > limit, np.float32(-1.0), -over / max(buffer, 1)).astype(np.float32)
