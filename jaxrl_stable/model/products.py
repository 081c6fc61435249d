"""Matrix products of activations with stored weights, in the compute dtype or on a coarse grid.

Weights and activations use the same symmetric quantisation, `x ≈ values · scale`. The scale maps
the largest |x| of a channel (weights) or of a token (activations, computed afresh for each token)
to the largest value of the grid. In a product of two such operands the scales factor out:

    y[t, f] = scale_x[t] · scale_w[f] · Σ_d x[t, d] · w[d, f]

where x and w are grid values. "native" passes these values in their own dtype to the device's int8
or fp8 units, which accumulate in int32 or float32. "emulated" converts them to the compute dtype,
float32 or bfloat16, which represents all values of these grids exactly, and accumulates in float32.
Both give the same sum up to float32 rounding. For int8, even the emulated sum is exact up to 2²⁴,
that is, for at least 1,040 terms of up to 127².
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from jaxrl_stable.model.parameters import Quantized, cast, read
from jaxrl_stable.sharding import gathered

# Largest value of each grid. Grids are symmetric, so −128 and −8 are never used. float8_e4m3fn
# lacks an infinity (Micikevicius et al. 2022, arXiv:2209.05433, table 1).
LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}

# Arguments: x, w, and the dtype to accumulate in (None: the dtype of x).
Dot = Callable[[Array, Array, DTypeLike | None], Array]


def to_grid(
    x: Float[Array, "*shape"] | Float[np.ndarray, "*shape"],
    axes: tuple[int, ...],
    dtype: DTypeLike,
    across: tuple[str, ...] = (),
) -> tuple[Num[Array, "*shape"], Float[Array, "..."]]:
    """Rounds `x` to a grid, ties to even; stops gradients.

    Args:
      x: weights or activations; a non-finite value makes its scale and the product non-finite.
      axes: axes that share a scale; the scale keeps them with size one.
      dtype: dtype of the grid, a key of LARGEST.
      across: inside `jax.shard_map`, mesh axes over which `axes` are sharded.

    Returns:
      Grid values in `dtype`, and their float32 scale.
    """
    values, scale = _scaled(x, axes, dtype, across)
    return nearest(values, dtype).astype(dtype), scale


def nearest(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Rounds float32 `x` to the nearest grid value, ties to even; `x` must be in the grid's range.

    Uses only arithmetic: XLA converts to float8 via float16, which is slower on a CPU.
    """
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.round(x)
    # e4m3: three bits after the leading one, and steps of 2^-9 below 2^-6.
    small = jnp.round(x * 2.0**9) * 2.0**-9
    return jnp.where(jnp.abs(x) < 2.0**-6, small, jax.lax.reduce_precision(x, 8, 3))


def _scaled(
    x: Float[Array, "*shape"] | Float[np.ndarray, "*shape"],
    axes: tuple[int, ...],
    dtype: DTypeLike,
    across: tuple[str, ...],
) -> tuple[Float[Array, "*shape"], Float[Array, "..."]]:
    """Like `to_grid`, without rounding: returns the scaled values and their scale."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    if across:
        most = jax.lax.pmax(most, across)
    scale = most / LARGEST[jnp.dtype(dtype).name]
    scale = jnp.where(scale == 0, 1.0, scale)
    return x / scale, scale


def product(x: Float[Array, "..."], param: nnx.Param) -> Float[Array, "..."]:
    """Contracts the last axes of `x` with the `inputs` of a parameter, which are its first axes.

    Returns:
      The product in the dtype of `x`: remaining axes of `x`, then remaining axes of the parameter.
    """
    metadata = param.get_metadata()
    summed = len(metadata["inputs"])
    w = param.get_value()
    if quantizes_activations(w):
        w = jax.tree.map(lambda a: gathered(a, metadata["axes"]), w)
    else:
        w = read(param, x.dtype)

    def dot(
        x: Num[Array, "..."], w: Num[Array, "..."], dtype: DTypeLike | None
    ) -> Num[Array, "..."]:
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
    """Computes `dot(x, w)`; if `w` is `Quantized`, first rounds the activations to its grid.

    Args:
      dot: the product; its result starts with the axes of `x` that are not summed.
      x: activations, with one scale per row (token).
      w: matrix as returned by `operand`.
      channels: reshapes the scale of `w` to broadcast against the last axes of the result.
      summed: number of last axes of `x` that `dot` sums over.
      across: mesh axes over which these last axes are sharded; see `to_grid`.
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


def operand(value: Array | Quantized, dtype: DTypeLike) -> Array | Quantized:
    """Prepares a stored matrix for `multiply`: casts it, unless activations are quantised too."""
    return value if quantizes_activations(value) else cast(value, dtype)


def rounded(x: Float[Array, "... D"], param: nnx.Param) -> Float[Array, "... D"]:
    """Rounds activations as `product(x, param)` does; keeps their dtype."""
    w = param.get_value()
    if not quantizes_activations(w):
        return x
    values, scale = to_grid(x, (-1,), w.grid)
    return (values.astype(jnp.float32) * scale).astype(x.dtype)


def quantizes_activations(value: Array | Quantized) -> bool:
    """Returns whether products with a stored matrix round the activations to its grid."""
    return isinstance(value, Quantized) and value.products != "weight_only"


def products_implementation(dtype: str, device: Any = None) -> str:
    """Resolves "auto": "native" if the device has units for the dtype, else "emulated".

    TPUs, and NVIDIA GPUs of compute capability 7.5 or higher, have units for int8. TPU7x, and
    NVIDIA GPUs of 8.9 or higher, have units for float8_e4m3fn; elsewhere XLA converts the values.
    tokamax's grouped kernels are always "emulated"; see `dispatch.grouped_matmul`.

    Args:
      dtype: "int8" or "float8_e4m3fn".
      device: `jax.Device` to multiply on; the first device of this process by default.
    """
    device = device or jax.devices()[0]
    if device.platform == "tpu":
        return "native" if dtype == "int8" or "7" in device.device_kind else "emulated"
    if device.platform in ("gpu", "cuda"):
        least = (7, 5) if dtype == "int8" else (8, 9)
        version = tuple(int(n) for n in device.compute_capability.split("."))
        return "native" if version >= least else "emulated"
    return "emulated"
