"""DAPO's soft punishment of responses that near the length limit."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def overlong_penalty(
    lengths: Float[np.ndarray, "B"], limit: int, buffer: int
) -> Float[np.ndarray, "B"]:
    """What is added to the rewards (arXiv:2503.14476, eq. 13).

        0                               |y| ≤ limit − buffer
        (limit − buffer − |y|) / buffer in between
        −1                              |y| > limit

    DAPO: limit 20,480, buffer 4,096.

    Args:
      lengths: tokens of the responses.
      limit: L_max.
      buffer: L_cache; 0 punishes nothing within the limit.

    Raises:
      ValueError: a buffer that is negative or above the limit.
    """
    if not 0 <= buffer <= limit:
        raise ValueError(f"overlong_penalty: buffer is {buffer}; use 0 to limit ({limit})")
    lengths = np.asarray(lengths, np.float32)
    over = np.maximum(lengths - (limit - buffer), 0.0)
    return np.where(lengths > limit, np.float32(-1.0), -over / max(buffer, 1)).astype(np.float32)
