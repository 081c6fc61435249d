"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1; DeepSeek-V3, arXiv:2412.19437).

Keys and values of all heads are computed from one narrow latent per token, and all heads share the
rotated part of the keys. The cache holds only the latent and the shared rotated keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_stable.model.attention import Frame, Norm, attend, softmax_scale
from jaxrl_stable.model.cache import Cache
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.parameters import matrix, read
from jaxrl_stable.model.products import product, rounded
from jaxrl_stable.model.rotary import rotate

# Epsilon of the latents' norms, independent of `ModelConfig.rms_norm_eps` (transformers
# `DeepseekV3RMSNorm`, and the authors' own code).
LATENT_NORM_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Attention with keys and values from a shared latent, queries from x or their own latent."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None) -> None:
        D, H, hd, sizes = config.hidden_size, config.num_heads, config.head_dim, config.latent
        rank, rotary = sizes.key_value_rank, sizes.rotary_dim
        options = dict(stack=stack, dtype=config.param_dtype)
        norm = dict(eps=LATENT_NORM_EPS, dtype=config.param_dtype, stack=stack)
        self.config = config
        source, width = "embed", D
        if sizes.query_rank:
            source, width = "latent_in", sizes.query_rank
            self.query_down = matrix(rngs, {"embed": D, "latent": width}, ("embed",), **options)
            self.query_norm = Norm({"latent": width}, **norm)
        self.query = matrix(rngs, {source: width, "heads": H, "head_dim": hd}, (source,), **options)
        self.down = matrix(rngs, {"embed": D, "latent": rank + rotary}, ("embed",), **options)
        self.norm = Norm({"latent": rank}, **norm)
        both = hd - rotary + sizes.value_dim
        self.up = matrix(
            rngs, {"latent_in": rank, "heads": H, "head_dim": both}, ("latent_in",), **options
        )
        self.out = matrix(
            rngs,
            {"heads": H, "head_dim": sizes.value_dim, "embed": D},
            ("heads", "head_dim"),
            gain=(2 * config.num_layers) ** -0.5,
            **options,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        frame: Frame,
        cache: Cache | None,
        layer: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        sizes, plain = self.config.latent, self.config.head_dim - self.config.latent.rotary_dim
        turn = dict(cos=frame.cos, sin=frame.sin, interleaved=sizes.interleaved)
        with jax.named_scope("qkv"):
            q = x
            if sizes.query_rank:
                q = self.query_norm(product(x, self.query_down))
            q = product(q, self.query)
            down = product(x, self.down)
            latent = self.norm(down[..., : sizes.key_value_rank])
        with jax.named_scope("rope"):
            q = jnp.concatenate([q[..., :plain], rotate(q[..., plain:], **turn)], axis=-1)
            rotated = rotate(down[..., None, sizes.key_value_rank :], **turn)
        if cache is not None:
            with jax.named_scope("cache"):
                cache = cache.write(layer, rotated, latent[:, :, None])
                if frame.mask is not None:
                    rotated, latent = cache.keys[layer], cache.values[layer][:, :, 0]
        decoding = cache is not None and x.shape[1] == 1
        y = (self._absorbed if decoding else self._expanded)(q, latent, rotated, frame)
        with jax.named_scope("out"):
            return product(y, self.out), cache

    def _expanded(
        self,
        q: Float[Array, "B T H hd"],
        latent: Float[Array, "B S rank"],
        rotated: Float[Array, "B S 1 rotary"],
        frame: Frame,
    ) -> Float[Array, "B T H vd"]:
        """Expands keys and values of every head, then attends as usual."""
        plain, H = q.shape[-1] - rotated.shape[-1], q.shape[2]
        with jax.named_scope("qkv"):
            up = product(latent, self.up)
            rotated = jnp.broadcast_to(rotated, (*rotated.shape[:2], H, rotated.shape[3]))
            k, v = jnp.concatenate([up[..., :plain], rotated], axis=-1), up[..., plain:]
        # `dot_product_attention` needs the same width for all three.
        width = max(k.shape[-1], v.shape[-1])
        q, k, padded = (
            jnp.pad(y, ((0, 0), (0, 0), (0, 0), (0, width - y.shape[-1]))) for y in (q, k, v)
        )
        return attend(self.config, q, k, padded, frame)[..., : v.shape[-1]]

    @jax.named_scope("attended")
    def _absorbed(
        self,
        q: Float[Array, "B 1 H hd"],
        latent: Float[Array, "B S rank"],
        rotated: Float[Array, "B S 1 rotary"],
        frame: Frame,
    ) -> Float[Array, "B 1 H vd"]:
        """Like `_expanded`, but in latent space: decodes one column without expanding the cache.

        q · (W_k c) = (W_kᵀ q) · c, and Σ p (W_v c) = W_v Σ p c (arXiv:2405.04434, §2.1.2). If
        products quantise activations, c is rounded as the expanded product would round it. W_k and
        W_v are dequantised because here the sum runs over the axis of their scales.
        """
        latent = rounded(latent, self.up)
        plain = q.shape[-1] - rotated.shape[-1]
        up = read(self.up, q.dtype)
        narrow = jnp.einsum("bthk,rhk->bthr", q[..., :plain], up[..., :plain])
        logits = jnp.einsum("bthr,bsr->bhts", narrow, latent, preferred_element_type=jnp.float32)
        logits += jnp.einsum(
            "bthk,bsk->bhts", q[..., plain:], rotated[:, :, 0], preferred_element_type=jnp.float32
        )
        # A finite value keeps rows that attend to no column (finished rows) from becoming NaN.
        lowest = 0.7 * jnp.finfo(jnp.float32).min
        logits = jnp.where(frame.mask, logits * softmax_scale(self.config), lowest)
        mixed = jnp.einsum("bhts,bsr->bthr", jax.nn.softmax(logits).astype(q.dtype), latent)
        return jnp.einsum("bthr,rhk->bthk", mixed, up[..., plain:])
