"""Parameters: shape, logical axes and initialiser of a weight, declared once and side by side.

A weight is an `nnx.Param` with two pieces of metadata: `axes`, its logical axis names (sharding
rules map them to mesh axes), and `inputs`, the axes that a product with it sums over (they set the
scale of its initialiser and the channels of its quantised copy; None for what is no matrix).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxrl_stable.sharding import gathered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix on a coarse grid, with one float32 scale per output channel: `values * scale`.

    Attributes:
      values: int8, int4 or float8_e4m3fn, in that type or a wider one.
      scale: of each output channel; the axes that a product sums over have size one.
      products: how activations meet it, static: "weight_only" dequantises the matrix; "native" and
        "emulated" put the activations on the same grid, see `products`.
      stored_wider: name of the grid when `values` has another type than it, static; see
        `quantize.expanded`.
    """

    values: Num[Array, "..."]
    scale: Float[Array, "..."]
    products: str = dataclasses.field(default="weight_only", metadata=dict(static=True))
    stored_wider: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def grid(self) -> jnp.dtype:
        """int8, int4 or float8_e4m3fn."""
        return jnp.dtype(self.stored_wider or self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self, dtype: jnp.dtype) -> Float[Array, "..."]:
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
    """A weight drawn from N(0, gain² / fan_in), with a leading `layers` axis when stacked.

    Args:
      rngs: source of the key.
      axes: logical name and size of each axis, in order.
      inputs: the axes that are summed over; their sizes multiply to fan_in.
      stack: number of layers that share this declaration, or None.
      gain: factor on the standard deviation.
      dtype: storage type.
    """
    fan_in = math.prod(axes[name] for name in inputs)
    names, shape = _stacked(axes, stack)
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * (gain / math.sqrt(fan_in))
    return nnx.Param(value.astype(dtype), axes=names, inputs=inputs)


def scale(
    axes: Mapping[str, int], *, stack: int | None = None, dtype: str = "float32"
) -> nnx.Param:
    """A multiplicative vector that starts at one (the weight of a norm)."""
    names, shape = _stacked(axes, stack)
    return nnx.Param(jnp.ones(shape, dtype), axes=names, inputs=None)


def offset(axes: Mapping[str, int], *, stack: int | None = None) -> nnx.Param:
    """An additive vector that starts at zero, always float32."""
    names, shape = _stacked(axes, stack)
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=names, inputs=None)


def read(param: nnx.Param, dtype: str | jnp.dtype) -> Float[Array, "..."]:
    """The value of a parameter in the compute type, whole on every device but for `tensor`.

    The cast comes first: half the bytes travel. What is `Quantized` is dequantised.
    """
    return gathered(cast(param.get_value(), dtype), param.get_metadata()["axes"])


def cast(value: Array | Quantized, dtype: str | jnp.dtype) -> Float[Array, "..."]:
    """A stored value in the compute type."""
    if isinstance(value, Quantized):
        return value.dequantize(jnp.dtype(dtype))
    return value.astype(dtype)


def _stacked(axes: Mapping[str, int], stack: int | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if stack is None:
        return tuple(axes), tuple(axes.values())
    return ("layers", *axes), (stack, *axes.values())
