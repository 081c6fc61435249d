"""The sampler's copy of the weights, optionally as int8: a real training-inference gap.

Weight-only, symmetric, one scale per output channel: `w ≈ round(w / s) · s` with `s = max|w| / 127`
over the axes that a product sums over. Norms, embeddings, router and output head stay as they are,
as inference engines leave them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_stable.configs import FORMATS
from jaxrl_stable.model.parameters import Quantized
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.sharding import constrain_state, spread

KEPT_AXES = ("vocab", "router")


def sampling_copy(model: Transformer, format: str) -> Transformer:
    """The weights that a sampler reads: `quantize`d, in the compute type, laid out for decoding.

    What is computed with them is the same but for the quantisation: a product reads its weights in
    the compute type anyway, only the router's stay float32. For the layout see `sharding.spread`.
    """

    def convert(param: nnx.Param) -> nnx.Param:
        value, axes = param.get_value(), param.get_metadata()["axes"]
        if isinstance(value, Quantized) or "router" in axes:
            return param
        return param.replace(value.astype(model.config.dtype))

    copy = spread(quantize(model, format))
    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return constrain_state(jax.tree.map(convert, copy, is_leaf=is_param))


def quantize(model: Transformer, format: str) -> Transformer:
    """A copy of the policy for sampling.

    Args:
      model: the policy in training.
      format: "none" returns the model itself, "int8" stores its matrices as `Quantized`.

    Raises:
      ValueError: unknown format.
    """
    if format == "none":
        return model
    if format != "int8":
        raise ValueError(f"rollout format {format!r} is unknown; use one of {FORMATS}")

    def convert(param: nnx.Param) -> nnx.Param:
        metadata = param.get_metadata()
        axes, inputs = metadata["axes"], metadata["inputs"]
        if inputs is None or any(name in KEPT_AXES for name in axes):
            return param
        summed = tuple(axes.index(name) for name in inputs)
        value = param.get_value().astype(jnp.float32)
        scale = jnp.max(jnp.abs(value), axis=summed, keepdims=True) / 127.0
        scale = jnp.where(scale > 0, scale, 1.0)
        return param.replace(Quantized(jnp.round(value / scale).astype(jnp.int8), scale))

    return jax.tree.map(convert, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
