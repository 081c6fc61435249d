"""The sampler's copy of the weights on a coarse grid: a real training-inference gap.

| format | weights | activations |
|---|---|---|
| `none` | as they are | as they are |
| `int8`, `int4`, `fp8` | integers to ±127, to ±7, float8_e4m3fn to ±448 | as they are |
| `int8_w8a8`, `fp8_w8a8` | as `int8`, `fp8` | the same grid, one scale per token, found anew |

Symmetric, with one scale per output channel: `w ≈ w / s on the grid · s`, where s puts the largest
|w|, over the axes that a product sums over, on the largest value of the grid. Norms, embeddings,
router and output head stay as they are, as inference engines leave them. How activations are
treated, and which products are computed, `model/products.py` says. No gradient flows through.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_stable.configs import FORMATS
from jaxrl_stable.model.parameters import Quantized
from jaxrl_stable.model.products import products_implementation, to_grid
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.sharding import constrain_state, for_sampling

KEPT_AXES = ("vocab", "router")
GRIDS = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}  # storage types


def sampling_copy(model: Transformer, format: str, products: str = "auto") -> Transformer:
    """The weights that a sampler reads: `quantize`d, in the compute type, laid out for decoding.

    What is computed with them is the same but for the quantisation: a product reads its weights in
    the compute type anyway, only the router's stay float32. See `sharding.for_sampling`.
    """

    def convert(param: nnx.Param) -> nnx.Param:
        value, axes = param.get_value(), param.get_metadata()["axes"]
        if isinstance(value, Quantized) or "router" in axes:
            return param
        return param.replace(value.astype(model.config.dtype))

    copy = for_sampling(quantize(model, format, products))
    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return constrain_state(jax.tree.map(convert, copy, is_leaf=is_param))


def quantize(model: Transformer, format: str, products: str = "auto") -> Transformer:
    """A copy of the policy for sampling.

    Args:
      model: the policy in training.
      format: one of FORMATS; "none" returns the model itself, the others store its matrices as
        `Quantized`.
      products: of weights and activations on a grid: "native", "emulated" or "auto"; see
        `resolve_products`.

    Raises:
      ValueError: unknown format or kind of products.
    """
    how = resolve_products(format, products)
    if format == "none":
        return model
    dtype = jnp.dtype(GRIDS[format.removesuffix("_w8a8")])

    def convert(param: nnx.Param) -> nnx.Param:
        metadata = param.get_metadata()
        axes, inputs = metadata["axes"], metadata["inputs"]
        if inputs is None or any(name in KEPT_AXES for name in axes):
            return param
        summed = tuple(axes.index(name) for name in inputs)
        return param.replace(Quantized(*to_grid(param.get_value(), summed, dtype), how))

    return jax.tree.map(convert, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def expanded(copy: Transformer) -> Transformer:
    """A `quantize`d copy with its matrices in the compute type, the same in all that it computes.

    They are then converted once, and not for every token that is sampled. It takes the memory that
    quantising saved, and is no gain where a device reads the narrow type faster: for small
    policies. "native" products keep theirs.
    """
    dtype = jnp.dtype(copy.config.dtype)

    def convert(param: nnx.Param) -> nnx.Param:
        value = param.get_value()
        if not isinstance(value, Quantized) or value.products == "native":
            return param
        if value.products == "weight_only":
            return param.replace(value.dequantize(dtype))
        values = value.values.astype(dtype)
        return param.replace(
            dataclasses.replace(value, values=values, stored_wider=value.grid.name)
        )

    return jax.tree.map(convert, copy, is_leaf=lambda x: isinstance(x, nnx.Variable))


def resolve_products(format: str, products: str = "auto", device: jax.Device | None = None) -> str:
    """How a sampler of this format multiplies, for logs: "weight_only", "native" or "emulated".

    Weights alone are dequantised: "weight_only", whatever is asked for. Of weights and activations,
    "native" products run in the stored type and "emulated" ones in the compute type, on the same
    grid; "auto" is what `products_implementation` names for the device.

    Args:
      format: one of FORMATS.
      products: "auto", "native" or "emulated".
      device: this process's first by default.

    Raises:
      ValueError: unknown format or kind of products.
    """
    if format not in FORMATS:
        raise ValueError(f"rollout format {format!r} is unknown; use one of {FORMATS}")
    if products not in ("auto", "native", "emulated"):
        raise ValueError(f"products is {products!r}; use 'auto', 'native' or 'emulated'")
    if not format.endswith("_w8a8"):
        return "weight_only"
    if products != "auto":
        return products
    return products_implementation(GRIDS[format.removesuffix("_w8a8")], device)
