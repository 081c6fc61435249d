"""Parameters: shape, logical axes and initialiser of each weight, declared in one place.

A weight is an `nnx.Param` with two pieces of metadata. `axes` are its logical axis names, which
sharding rules map to mesh axes. `inputs` are the axes that a product with the weight sums over;
they determine the scale of the initialiser and the channels of the quantised copy. For vectors,
`inputs` is None.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from jaxrl_stable.sharding import gathered


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix on a coarse grid, with one float32 scale per output channel: `values * scale`.

    Attributes:
      values: grid values (int8, int4 or float8_e4m3fn), stored in that dtype or a wider one.
      scale: scale per output channel; axes that a product sums over have size one.
      products: "weight_only" dequantises the matrix; "native" and "emulated" round the activations
        to the same grid (see `products`). Static.
      stored_wider: dtype of the grid if `values` has a wider dtype (see `quantize.expanded`), else
        None. Static.
    """

    values: Num[Array, "..."]
    scale: Float[Array, "..."]
    products: str = dataclasses.field(default="weight_only", metadata=dict(static=True))
    stored_wider: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def grid(self) -> jnp.dtype:
        """Dtype of the grid: int8, int4 or float8_e4m3fn."""
        return jnp.dtype(self.stored_wider or self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "..."]:
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def matrix(
    rngs: nnx.Rngs,
    axes: Mapping[str, int],
    inputs: tuple[str, ...],
    *,
    stack: int | None = None,
    gain: float = 1.0,
    dtype: str = "float32",
) -> nnx.Param:
    """Draws a weight from N(0, gain² / fan_in), with a leading `layers` axis if stacked.

    Args:
      rngs: source of the random key.
      axes: logical name and size of each axis, in order.
      inputs: axes that a product sums over; fan_in is the product of their sizes.
      stack: number of layers that share this declaration, or None.
      gain: factor on the standard deviation.
      dtype: storage dtype.
    """
    fan_in = math.prod(axes[name] for name in inputs)
    names, shape = _stacked(axes, stack)
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * (gain / math.sqrt(fan_in))
    return nnx.Param(value.astype(dtype), axes=names, inputs=inputs)


def scale(
    axes: Mapping[str, int], *, stack: int | None = None, dtype: str = "float32"
) -> nnx.Param:
    """Creates a multiplicative vector of ones (the weight of a norm)."""
    names, shape = _stacked(axes, stack)
    return nnx.Param(jnp.ones(shape, dtype), axes=names, inputs=None)


def offset(axes: Mapping[str, int], *, stack: int | None = None) -> nnx.Param:
    """Creates an additive vector of zeros, always float32."""
    names, shape = _stacked(axes, stack)
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=names, inputs=None)


def read(param: nnx.Param, dtype: DTypeLike) -> Float[Array, "..."]:
    """Returns a parameter in the compute dtype, gathered over all its mesh axes except `tensor`.

    The cast precedes the gather, which halves the bytes sent. `Quantized` values are dequantised.
    """
    return gathered(cast(param.get_value(), dtype), param.get_metadata()["axes"])


def cast(value: Array | Quantized, dtype: DTypeLike) -> Float[Array, "..."]:
    """Casts a stored value to `dtype`; dequantises it if needed."""
    if isinstance(value, Quantized):
        return value.dequantize(jnp.dtype(dtype))
    return value.astype(dtype)


def _stacked(axes: Mapping[str, int], stack: int | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if stack is None:
        return tuple(axes), tuple(axes.values())
    return ("layers", *axes), (stack, *axes.values())
