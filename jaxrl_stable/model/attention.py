"""Grouped-query attention with per-head query/key norms and rotary positions (Qwen3)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable.model.cache import Cache
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.parameters import matrix, read, scale


class Frame(NamedTuple):
    """What all layers of one forward share: rotations of the positions, and who sees whom."""

    cos: Float[Array, "B T hd"]
    sin: Float[Array, "B T hd"]
    mask: Bool[Array, "B 1 T S"]
    real: Bool[Array, "B T"]


def make_frame(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    cache: Cache | None,
) -> Frame:
    """Rotations and mask. A token sees the columns up to its own that share its segment.

    Columns, not positions, decide what is past: left padding and packing then need no special case.
    """
    steps = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) / config.rope_theta**steps
    angles = jnp.concatenate([angles, angles], axis=-1)
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
    return Frame(jnp.cos(angles), jnp.sin(angles), mask[:, None], real)


class Norm(nnx.Module):
    """RMSNorm in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""

    def __init__(self, axis: str, size: int, config: ModelConfig, stack: int | None = None):
        self.weight = scale({axis: size}, stack=stack, dtype=config.param_dtype)
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * read(self.weight, x.dtype)


class Attention(nnx.Module):
    """Qwen3 attention: no biases, RMSNorm on each query and key head before the rotation."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None):
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
        self.query_norm = Norm("head_dim", hd, config, stack)
        self.key_norm = Norm("head_dim", hd, config, stack)

    def __call__(
        self, x: Float[Array, "B T D"], frame: Frame, cache: Cache | None, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        q = jnp.einsum("btd,dhk->bthk", x, read(self.query, x.dtype))
        k = jnp.einsum("btd,dgk->btgk", x, read(self.key, x.dtype))
        v = jnp.einsum("btd,dgk->btgk", x, read(self.value, x.dtype))
        q = _rotate(self.query_norm(q), frame)
        k = _rotate(self.key_norm(k), frame)
        if cache is not None:
            cache = cache.write(layer, k, v)
            k, v = cache.keys[layer], cache.values[layer]
        y = jax.nn.dot_product_attention(
            q, k, v, mask=frame.mask, implementation=attention_implementation(self.config)
        )
        return jnp.einsum("bthk,hkd->btd", y, read(self.out, x.dtype)), cache


def attention_implementation(config: ModelConfig) -> str:
    """Resolves "auto": cuDNN for half precision on NVIDIA GPUs, the plain XLA form elsewhere."""
    if config.attention != "auto":
        return config.attention
    half = config.dtype in ("bfloat16", "float16")
    return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def _rotate(x: Float[Array, "B T H hd"], frame: Frame) -> Float[Array, "B T H hd"]:
    """Rotary embedding in the half-split layout of Hugging Face (Su et al., arXiv:2104.09864)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    y = x.astype(jnp.float32) * frame.cos[:, :, None] + turned * frame.sin[:, :, None]
    return y.astype(x.dtype)
