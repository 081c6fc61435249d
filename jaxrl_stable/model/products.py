"""Products of activations with stored matrices, in the compute type or on a coarse grid.

Quantisation is symmetric, and the same for weights and activations: `x ≈ values · scale`, with the
scale that puts the largest |x| of a channel (of a weight) or of a token (of activations, found
anew for each) on the largest value of the grid. Of two such operands the scales leave the sum:

    y[t, f] = scale_x[t] · scale_w[f] · Σ_d x[t, d] · w[d, f]

where x and w are grid values. "native" hands these to the device in their own type, for its int8 or
fp8 units, which add up in int32 or float32. "emulated" converts them to the compute type, float32
or bfloat16, which holds every value of these grids exactly, and adds up in float32. So both give
the same sum but for the rounding of its float32 additions; int8 has none up to 2²⁴ = 1,040 · 127².
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from jaxrl_stable.model.parameters import Quantized, cast, read
from jaxrl_stable.sharding import gathered

# The largest value of each grid; symmetric, so that −128 and −8 are never used. float8_e4m3fn has
# no infinity (Micikevicius et al. 2022, arXiv:2209.05433, table 1).
LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}

Dot = Callable[[Array, Array, jnp.dtype | None], Array]  # x, w, type of the sums (None: that of x)


def to_grid(
    x: Float[Array, "..."],
    axes: tuple[int, ...],
    dtype: jnp.dtype,
    across: tuple[str, ...] = (),
) -> tuple[Num[Array, "..."], Float[Array, "..."]]:
    """Values of a grid, rounded to nearest even, and their float32 scale; no gradient flows back.

    Args:
      x: weights or activations; what is not finite makes its scale so, and hence the product.
      axes: those that share a scale; kept, with size one.
      dtype: one of LARGEST.
      across: inside `jax.shard_map`, mesh axes that these axes are cut over.
    """
    values, scale = _scaled(x, axes, dtype, across)
    return nearest(values, dtype).astype(dtype), scale


def nearest(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The nearest value of a grid, ties to even; x is float32 and not beyond the grid's largest.

    Arithmetic alone: XLA converts to float8 by way of float16, which takes a CPU longer.
    """
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.round(x)
    # e4m3: three bits behind the leading one, and steps of 2^-9 below 2^-6.
    small = jnp.round(x * 2.0**9) * 2.0**-9
    return jnp.where(jnp.abs(x) < 2.0**-6, small, jax.lax.reduce_precision(x, 8, 3))


def _scaled(
    x: Float[Array, "..."], axes: tuple[int, ...], dtype: jnp.dtype, across: tuple[str, ...]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`to_grid` before its rounding."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    if across:
        most = jax.lax.pmax(most, across)
    scale = most / LARGEST[jnp.dtype(dtype).name]
    scale = jnp.where(scale == 0, 1.0, scale)
    return x / scale, scale


def product(x: Float[Array, "..."], param: nnx.Param) -> Float[Array, "..."]:
    """Sums the last axes of activations over the `inputs` of a parameter, its first ones.

    Returns:
      In the type of `x`, the other axes of `x` and then those of the parameter.
    """
    metadata = param.get_metadata()
    summed = len(metadata["inputs"])
    w = param.get_value()
    if quantizes_activations(w):
        w = jax.tree.map(lambda a: gathered(a, metadata["axes"]), w)
    else:
        w = read(param, x.dtype)

    def dot(x, w, dtype):
        return jnp.tensordot(x, w, summed, preferred_element_type=dtype)

    return multiply(dot, x, w, lambda scale: scale.reshape(scale.shape[summed:]), summed)


def multiply(
    dot: Dot,
    x: Float[Array, "..."],
    w: Float[Array, "..."] | Quantized,
    channels: Callable[[Array], Array],
    summed: int = 1,
    across: tuple[str, ...] = (),
) -> Float[Array, "..."]:
    """`dot(x, w)`; of a `Quantized` matrix with the activations on its grid.

    Args:
      dot: the product; its result begins with the axes of `x` that it does not sum over.
      x: activations; a row of them (a token) shares a scale.
      w: as `operand` gives it.
      channels: brings the scale of `w` into a shape that fits the last axes of the result.
      summed: number of axes of `x`, its last ones, that `dot` sums over.
      across: see `to_grid`.
    """
    if not isinstance(w, Quantized):
        return dot(x, w, None)
    rows, scale = _scaled(x, tuple(range(-summed, 0)), w.grid, across)
    rows = nearest(rows, w.grid)
    if w.products == "native":
        integer = jnp.issubdtype(w.grid, jnp.integer)
        sums = jnp.int32 if integer else jnp.float32
        y = dot(rows.astype(w.grid), w.values, sums).astype(jnp.float32)
    else:
        y = dot(rows.astype(x.dtype), w.values.astype(x.dtype), jnp.float32)
    kept = scale.shape[:-summed]
    scale = scale.reshape(kept + (1,) * (y.ndim - len(kept)))
    return (y * scale * channels(w.scale)).astype(x.dtype)


def operand(value: Array | Quantized, dtype: jnp.dtype) -> Array | Quantized:
    """A stored matrix as `multiply` takes it: in the compute type, unless activations join it."""
    return value if quantizes_activations(value) else cast(value, dtype)


def rounded(x: Float[Array, "... D"], param: nnx.Param) -> Float[Array, "... D"]:
    """Activations as `product(x, param)` sees them, in their own type."""
    w = param.get_value()
    if not quantizes_activations(w):
        return x
    values, scale = to_grid(x, (-1,), w.grid)
    return (values.astype(jnp.float32) * scale).astype(x.dtype)


def quantizes_activations(value: Array | Quantized) -> bool:
    """Whether products with a stored matrix put the activations on its grid."""
    return isinstance(value, Quantized) and value.products != "weight_only"


def products_implementation(dtype: str, device: jax.Device | None = None) -> str:
    """What "auto" stands for: "native" where the device has units for the type, else "emulated".

    int8: TPUs, and NVIDIA GPUs from compute capability 7.5. float8_e4m3fn: TPU7x, and NVIDIA GPUs
    from 8.9; XLA converts it on other devices. tokamax's grouped kernels are "emulated" whatever is
    asked for, see `dispatch.grouped_matmul`.

    Args:
      dtype: "int8" or "float8_e4m3fn".
      device: this process's first by default.
    """
    device = device or jax.devices()[0]
    if device.platform == "tpu":
        return "native" if dtype == "int8" or "7" in device.device_kind else "emulated"
    if device.platform in ("gpu", "cuda"):
        least = (7, 5) if dtype == "int8" else (8, 9)
        version = tuple(int(n) for n in device.compute_capability.split("."))
        return "native" if version >= least else "emulated"
    return "emulated"
