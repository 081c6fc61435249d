"""Quantised copies of the weights for sampling, which cause a real training-inference gap.

| format | weights | activations |
|---|---|---|
| `none` | unchanged | unchanged |
| `int8`, `int4`, `fp8` | integers to ±127, to ±7, float8_e4m3fn to ±448 | unchanged |
| `int8_w8a8`, `fp8_w8a8` | as for `int8`, `fp8` | same grid, with one dynamic scale per token |

Quantisation is symmetric with one scale per output channel: `w ≈ round(w / s) · s`. The scale s
maps the channel's largest |w| to the grid's largest value. Norms, embeddings, router and output
head are unchanged, as in inference engines. `model/products.py` describes activations and products.
No gradient flows through the quantised copy.
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
GRIDS = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3fn"}  # storage dtypes


def sampling_copy(model: Transformer, format: str, products: str = "auto") -> Transformer:
    """Returns the weights for a sampler: quantised, in the compute dtype, laid out for decoding.

    Only quantisation changes results: products read weights in the compute dtype anyway, and the
    router's weights stay float32. See `sharding.for_sampling` for the layout.

    Args:
      model, format, products: see `quantize`.
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
    """Returns a quantised copy of the policy.

    Args:
      model: the policy being trained.
      format: one of FORMATS; "none" returns the model itself, other formats store its matrices as
        `Quantized`.
      products: implementation of products with quantised weights and activations: "native",
        "emulated" or "auto"; see `resolve_products`.

    Raises:
      ValueError: if `format` or `products` is unknown.
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
    """Stores the matrices of a quantised copy in the compute dtype, without changing results.

    Matrices are then converted once instead of once per sampled token. This undoes the memory
    savings of quantisation and does not help on devices that read narrow dtypes faster, so it is
    meant for small policies. Matrices for "native" products are left unchanged.
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
    """Resolves how a sampler with this format computes matrix products.

    Formats that quantise only weights always dequantise them ("weight_only"). Formats that also
    quantise activations multiply in the stored dtype ("native") or, on the same grid, in the
    compute dtype ("emulated"); "auto" defers to `products_implementation`.

    Args:
      format: one of FORMATS.
      products: "auto", "native" or "emulated".
      device: device to multiply on; the first device of this process by default.

    Returns:
      "weight_only", "native" or "emulated".

    Raises:
      ValueError: if `format` or `products` is unknown.
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
