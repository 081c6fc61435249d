"""The policy: embedding, scanned blocks with explicit router outputs, and a final norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from jaxrl_stable.model.attention import Attention, Frame, Norm, make_frame
from jaxrl_stable.model.cache import Cache
from jaxrl_stable.model.config import ModelConfig, layer_plan
from jaxrl_stable.model.embedding import lookup
from jaxrl_stable.model.experts import Experts, FeedForward, RouterOutput
from jaxrl_stable.model.latent_attention import LatentAttention
from jaxrl_stable.model.parameters import matrix
from jaxrl_stable.routing import Routing, check_layout, expert_dtype
from jaxrl_stable.sharding.layout import layout

PRODUCTS = ("query", "key", "value", "attended", "gate", "up")  # kept by remat "dots"
Body = Callable[[Any, Any], tuple[Any, Any]]  # body of a scan


class ModelOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
      hidden: final hidden states, after the last norm; `hidden[b, t]` predicts token t + 1.
      router: routing of the L MoE layers.
      cache: the input cache, extended by the new columns; None if no cache was passed.
    """

    hidden: Float[Array, "B T D"]
    router: RouterOutput
    cache: Cache | None


class Block(nnx.Module):
    """Pre-norm transformer block with experts (`moe`) or a dense feed-forward layer."""

    def __init__(self, config: ModelConfig, moe: bool, rngs: nnx.Rngs, stack: int | None) -> None:
        self.moe = moe
        norm = dict(eps=config.rms_norm_eps, dtype=config.param_dtype, stack=stack)
        self.attention_norm = Norm({"embed": config.hidden_size}, **norm)
        self.attention = (LatentAttention if config.latent else Attention)(config, rngs, stack)
        self.mlp_norm = Norm({"embed": config.hidden_size}, **norm)
        if moe:
            self.mlp = Experts(config, rngs, stack)
        else:
            self.mlp = FeedForward(config, config.intermediate_size, rngs, stack)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        frame: Frame,
        cache: Cache | None,
        layer: Int[Array, ""],
        replay: Routing | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterOutput | None]:
        x = checkpoint_name(x, "block_input")
        with jax.named_scope("attention"):
            y, cache = self.attention(self.attention_norm(x), frame, cache, layer)
            x = frame.layout.constrain(x + y, None)
        with jax.named_scope("mlp"):
            y, router = self.mlp_norm(x), None
            if self.moe:
                y, router = self.mlp(y, frame.real, replay, frame.layout)
            else:
                y = self.mlp(y)
            return frame.layout.constrain(x + y, None), cache, router


class Transformer(nnx.Module):
    """A decoder like transformers' `Qwen3MoeModel`; an immutable pytree once built.

    Layers are stored stacked: `stacks[i]` holds the blocks of one repeated pattern (`layer_plan`),
    each parameter with a leading `layers` axis, and is applied with one `jax.lax.scan`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        # fan_in = `embed` gives rows with a norm of about one, so tied logits are of order one.
        self.embedding = matrix(
            rngs, {"vocab": V, "embed": D}, ("embed",), dtype=config.param_dtype
        )
        self.stacks = nnx.List(
            nnx.List(Block(config, moe, rngs, repeats) for moe in pattern)
            for pattern, repeats in layer_plan(config)
        )
        self.norm = Norm({"embed": D}, config.rms_norm_eps, config.param_dtype)
        if not config.tie_embeddings:
            self.head = matrix(rngs, {"embed": D, "vocab": V}, ("embed",), dtype=config.param_dtype)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"],
        *,
        replay: Routing | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Runs T columns through all layers.

        Args:
          tokens: token ids; values at padding are ignored.
          positions: rotary positions, counted within a segment.
          segment_ids: segment of each token; 0 is padding. Tokens attend only to their own segment.
          replay: experts that replace the live choice where valid; None uses the live choice.
          cache: if given, the new columns are appended to it and attend to its content.

        Returns:
          Hidden states, router outputs, and the extended cache.

        Raises:
          ValueError: if the shape or dtype of `replay` does not match the tokens and routers.
        """
        config = self.config
        tokens, positions, segment_ids = map(jnp.asarray, (tokens, positions, segment_ids))
        if replay is not None:
            check_layout(replay, config.num_moe_layers, config.num_experts)
            shape = (*tokens.shape, config.num_experts_per_token)
            if replay.experts.shape[1:] != shape:
                raise ValueError(
                    f"replay.experts has shape {replay.experts.shape}; these tokens need {shape} "
                    "after the layer axis"
                )
        if cache is not None:
            cache = cache.extend(segment_ids)
        where = layout(*tokens.shape, sampling=cache is not None)
        frame = make_frame(config, positions, segment_ids, cache, where)
        x = lookup(self.embedding, tokens, config.dtype, where)
        outputs, layer, moe_layer = [_no_router(config, tokens)], 0, 0
        for blocks, (pattern, repeats) in zip(self.stacks, layer_plan(config), strict=True):
            count = repeats * sum(pattern)
            slices = None
            if replay is not None:
                slices = replay.experts[moe_layer : moe_layer + count]
                slices = slices.reshape(repeats, sum(pattern), *slices.shape[1:])
            first = layer + jnp.arange(repeats) * len(pattern)

            def body(
                carry: tuple[Array, Cache | None], xs: tuple[Any, ...]
            ) -> tuple[tuple[Array, Cache | None], RouterOutput | None]:
                x, cache = carry
                blocks, experts, first = xs
                routers = []
                for i, block in enumerate(blocks):
                    chosen = None
                    if block.moe and experts is not None:
                        chosen = Routing(experts[len(routers)], replay.valid)
                    x, cache, router = block(x, frame, cache, first + i, chosen)
                    if router is not None:
                        routers.append(router)
                stacked = jax.tree.map(lambda *r: jnp.stack(r), *routers) if routers else None
                return (x, cache), stacked

            (x, cache), router = _repeat(
                _rematerialised(body, config),
                (x, cache),
                (blocks, slices, first),
                repeats,
                scan=config.scan_layers,
            )
            if router is not None:
                outputs.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), router))
            layer, moe_layer = layer + repeats * len(pattern), moe_layer + count
        router = jax.tree.map(lambda *r: jnp.concatenate(r), *outputs)
        if cache is not None:
            cache = cache.advance(tokens.shape[1])
        with jax.named_scope("final_norm"):
            return ModelOutput(self.norm(x), router, cache)

    def head_weight(self) -> Float[Array, "D V"]:
        """Returns the output projection as stored; the transposed embedding if tied."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def head_axes(self) -> tuple[str, ...]:
        """Returns the logical axes of `head_weight`."""
        if self.config.tie_embeddings:
            return self.embedding.get_metadata()["axes"][::-1]
        return self.head.get_metadata()["axes"]


def init_model(config: ModelConfig, seed: int | Key[Array, ""]) -> Transformer:
    """Initialises a policy; call this under `jax.eval_shape` to get a template."""
    return Transformer(config, nnx.Rngs(seed))


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of parameters, computed from shapes only."""
    shapes = jax.eval_shape(lambda: init_model(config, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _repeat(body: Body, carry: Any, xs: Any, repeats: int, *, scan: bool) -> tuple[Any, Any]:
    """Runs `jax.lax.scan`, or the same loop unrolled."""
    if scan:
        return jax.lax.scan(body, carry, xs, length=repeats)
    ys = []
    for i in range(repeats):
        carry, y = body(carry, jax.tree.map(lambda a, i=i: a[i], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def _rematerialised(body: Body, config: ModelConfig) -> Body:
    """Wraps the scan body in `jax.checkpoint`; policies use the names set by `checkpoint_name`."""
    if config.remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = {
        "block": None,
        "dots": policies.save_only_these_names(*PRODUCTS),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["block_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[config.remat]
    # Within a scan the compiler cannot merge the two forward passes; in unrolled code it could.
    return jax.checkpoint(body, policy=policy, prevent_cse=not config.scan_layers)


def _no_router(config: ModelConfig, tokens: Int[Array, "B T"]) -> RouterOutput:
    """Returns the router output of zero layers, so dense models have the same output structure."""
    B, T = tokens.shape
    experts = jnp.zeros((0, B, T, config.num_experts_per_token), expert_dtype(config.num_experts))
    return RouterOutput(
        experts=experts,
        live=experts,
        confidence=jnp.zeros((0, B, T), jnp.float32),
        load=jnp.zeros((0, config.num_experts), jnp.float32),
    )
