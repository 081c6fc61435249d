"""Grouped-query attention (Qwen3, OLMoE, Mixtral), its norms, and the inputs that layers share.

Latent attention (DeepSeek-V3) is in `latent_attention` and has the same call signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable.model.cache import Cache
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.parameters import matrix, read, scale
from jaxrl_stable.model.products import product
from jaxrl_stable.model.rotary import rotate, rotations
from jaxrl_stable.model.splash import splash_attention
from jaxrl_stable.sharding.layout import ONE_DEVICE, Layout


class Frame(NamedTuple):
    """Inputs that all layers of one forward pass share: rotations and the attention mask.

    Attributes:
      cos, sin: cosine and sine of the rotary angles.
      segment_ids: segment of each token; 0 is padding.
      real: False on padding.
      mask: True where a token (T) attends to a column (S); None if the kernel builds its own mask.
      layout: placement of rows and columns on the mesh.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    segment_ids: Int[Array, "B T"]
    real: Bool[Array, "B T"]
    mask: Bool[Array, "B 1 T S"] | None
    layout: Layout


def make_frame(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cache: Cache | None,
    layout: Layout = ONE_DEVICE,
) -> Frame:
    """Builds rotations and mask: a token attends to columns of its segment, up to its own column.

    Causality follows columns, not positions, so left padding and packing need no special case. If
    all columns are new (training and prefill), the splash kernel builds its own mask, and `mask` is
    None.
    """
    shared = *rotations(config, positions), segment_ids, segment_ids != 0
    width = positions.shape[1] if cache is None else cache.segment_ids.shape[1]
    if attention_implementation(config) == "splash" and positions.shape[1] == width > 1:
        return Frame(*shared, None, layout)
    columns = jnp.arange(positions.shape[1])
    if cache is None:
        key_columns, key_segments = columns, segment_ids
    else:
        columns = columns + cache.length
        key_columns, key_segments = jnp.arange(cache.segment_ids.shape[1]), cache.segment_ids
    real = segment_ids != 0
    same = segment_ids[:, :, None] == key_segments[:, None, :]
    causal = key_columns[None, :] <= columns[:, None]
    mask = same & causal & real[:, :, None]
    return Frame(*shared, mask[:, None], layout)


class Norm(nnx.Module):
    """RMSNorm over the named axes in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(
        self, axes: Mapping[str, int], eps: float, dtype: str, stack: int | None = None
    ) -> None:
        self.weight = scale(axes, stack=stack, dtype=dtype)
        self.axes = tuple(range(-len(axes), 0))
        self.eps = eps

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=self.axes, keepdims=True) + self.eps)
        return y.astype(x.dtype) * read(self.weight, x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention without biases (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None) -> None:
        D, H, G, hd = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        options = dict(stack=stack, dtype=config.param_dtype)
        self.config = config
        self.query = matrix(rngs, {"embed": D, "heads": H, "head_dim": hd}, ("embed",), **options)
        self.key = matrix(rngs, {"embed": D, "kv_heads": G, "head_dim": hd}, ("embed",), **options)
        self.value = matrix(
            rngs, {"embed": D, "kv_heads": G, "head_dim": hd}, ("embed",), **options
        )
        self.out = matrix(
            rngs,
            {"heads": H, "head_dim": hd, "embed": D},
            ("heads", "head_dim"),
            gain=(2 * config.num_layers) ** -0.5,
            **options,
        )
        if config.query_key_norm != "none":
            whole = config.query_key_norm == "layer"
            norm = dict(eps=config.rms_norm_eps, dtype=config.param_dtype, stack=stack)
            self.query_norm = Norm(({"heads": H} if whole else {}) | {"head_dim": hd}, **norm)
            self.key_norm = Norm(({"kv_heads": G} if whole else {}) | {"head_dim": hd}, **norm)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        frame: Frame,
        cache: Cache | None,
        layer: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        with jax.named_scope("qkv"):
            q, k, v = (product(x, param) for param in (self.query, self.key, self.value))
            if config.query_key_norm != "none":
                q, k = self.query_norm(q), self.key_norm(k)
            if config.clip_qkv is not None:
                bound = config.clip_qkv
                q, k, v = (jnp.clip(y, min=-bound, max=bound) for y in (q, k, v))
        with jax.named_scope("rope"):
            q, k = rotate(q, frame.cos, frame.sin), rotate(k, frame.cos, frame.sin)
        if cache is not None:
            with jax.named_scope("cache"):
                cache = cache.write(layer, k, v)
                if frame.mask is not None:
                    k, v = cache.keys[layer], cache.values[layer]
        y = attend(config, q, k, v, frame)
        with jax.named_scope("out"):
            return product(y, self.out), cache


@jax.named_scope("attended")
def attend(
    config: ModelConfig,
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B S G hd"],
    v: Float[Array, "B S G vd"],
    frame: Frame,
) -> Float[Array, "B T H vd"]:
    """Computes softmax(scale · q kᵀ) v over the columns that each token attends to."""
    q, k, v = (checkpoint_name(y, n) for y, n in ((q, "query"), (k, "key"), (v, "value")))
    layout, scale = frame.layout, softmax_scale(config)
    if frame.mask is None:
        y = splash_attention(q * scale, k, v, frame.segment_ids, layout)
        return checkpoint_name(y, "attended")
    implementation = attention_implementation(config)
    # cuDNN supports neither sharded columns nor heads split unevenly over devices.
    unequal = layout.columns or k.shape[2] % layout.size(("tensor",))
    if implementation == "splash" or unequal:
        implementation = "xla"
    k, v = layout.whole_columns(k), layout.whole_columns(v)
    y = jax.nn.dot_product_attention(
        q, k, v, mask=frame.mask, scale=scale, implementation=implementation
    )
    return checkpoint_name(y, "attended")


def softmax_scale(config: ModelConfig) -> float:
    """Returns head_dim^−½, times YaRN's extra factor if the model sets one."""
    extra = config.rope_scaling.softmax_scale if config.rope_scaling else 1.0
    return config.head_dim**-0.5 * extra


def attention_implementation(config: ModelConfig, backend: str | None = None) -> str:
    """Resolves "auto": splash on TPU, cuDNN for half precision on NVIDIA GPUs, else plain XLA.

    Heads wider than 128 (as in latent attention) use XLA, since cuDNN supports them only on some
    GPUs. On TPU, decode steps also run as plain XLA, because their keys are in a cache.

    Args:
      config: model configuration.
      backend: "cpu", "gpu" or "tpu"; JAX's default backend if None.

    Returns:
      "splash", "cudnn" or "xla".
    """
    if config.attention != "auto":
        return config.attention
    backend = backend or jax.default_backend()
    if backend == "tpu":
        return "splash"
    suits = config.dtype in ("bfloat16", "float16") and config.head_dim <= 128
    return "cudnn" if suits and backend == "gpu" else "xla"
