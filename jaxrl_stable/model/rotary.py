"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with YaRN context extension."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_stable.model.config import ModelConfig, Yarn


def rotations(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Returns cosine and sine of the angle position · frequency, per position and pair."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    scale = config.rope_scaling.rotation_scale if config.rope_scaling else 1.0
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def frequencies(config: ModelConfig) -> Float[np.ndarray, "half"]:
    """Returns each pair's frequency in radians per position: θ^(−2i/d) for pair i, or YaRN's."""
    dim = config.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = 1.0 / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is None:
        return plain
    return _stretched(plain, config.rope_theta, config.rope_scaling)


def _stretched(plain: np.ndarray, theta: float, yarn: Yarn) -> np.ndarray:
    """Divides slow frequencies by the factor and keeps fast ones (arXiv:2309.00071, eq. 23).

    A pair turns `context · frequency / 2π` times over the original context. Solving this for the
    index of the pair gives the ends of the ramp.
    """
    dim = 2 * len(plain)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # avoids division by zero for an empty ramp
    slow = np.clip((np.arange(len(plain), dtype=np.float32) - low) / width, 0, 1)
    return (plain / yarn.factor * slow + plain * (1 - slow)).astype(np.float32)


def rotate(
    x: Float[Array, "B T H d"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B T H d"]:
    """Rotates each pair of dimensions by its angle, in float32.

    Pairs are (i, i + d/2), as in Hugging Face's layout, or neighbours if `interleaved`. Either way,
    the result holds the first members of all pairs, then the second members. This order does not
    affect the product of a query with a key.
    """
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
