"""Feed-forward layers: the dense SwiGLU and the mixture of experts with its router."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, UInt

from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.expert_parallel import mixture
from jaxrl_stable.model.parameters import matrix, offset, read
from jaxrl_stable.model.products import product
from jaxrl_stable.model.router import choose, gate_weights, replayed
from jaxrl_stable.routing import Routing, expert_dtype
from jaxrl_stable.sharding.layout import ONE_DEVICE, Layout


class RouterOutput(NamedTuple):
    """Routing of one layer, or of all L MoE layers (with a leading `L` axis).

    Attributes:
      experts: ids of the experts used, in the router's order.
      live: the live router's choice; equals `experts` unless a choice was replayed.
      confidence: sum of the scores of the experts used, as a share of the sum of all E scores.
      load: number of (token, choice) pairs per expert, padding excluded.
    """

    experts: UInt[Array, "*L B T K"]
    live: UInt[Array, "*L B T K"]
    confidence: Float[Array, "*L B T"]
    load: Float[Array, "*L E"]


class FeedForward(nnx.Module):
    """Dense SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs, stack: int | None) -> None:
        D, F = config.hidden_size, width
        options = dict(stack=stack, dtype=config.param_dtype)
        gain = (2 * config.num_layers) ** -0.5
        self.gate = matrix(rngs, {"embed": D, "mlp": F}, ("embed",), **options)
        self.up = matrix(rngs, {"embed": D, "mlp": F}, ("embed",), **options)
        self.down = matrix(rngs, {"mlp": F, "embed": D}, ("mlp",), gain=gain, **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("gate"):
            gate = checkpoint_name(product(x, self.gate), "gate")
        with jax.named_scope("up"):
            up = checkpoint_name(product(x, self.up), "up")
        with jax.named_scope("down"):
            return product(jax.nn.silu(gate) * up, self.down)


class Experts(nnx.Module):
    """Mixture of experts: router, SwiGLU experts and shared experts. No token is dropped."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None) -> None:
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        options = dict(stack=stack, dtype=config.param_dtype)
        gain = (2 * config.num_layers) ** -0.5
        into, out = {"expert": E, "embed": D, "mlp": F}, {"expert": E, "mlp": F, "embed": D}
        self.config = config
        self.router = matrix(rngs, {"embed": D, "router": E}, ("embed",), **options)
        if config.selection_bias:
            self.selection_bias = offset({"router": E}, stack=stack)
        self.gate = matrix(rngs, into, ("embed",), **options)
        self.up = matrix(rngs, into, ("embed",), **options)
        self.down = matrix(rngs, out, ("mlp",), gain=gain, **options)
        if config.num_shared_experts:
            self.shared = FeedForward(config, config.num_shared_experts * F, rngs, stack)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        replay: Routing | None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Float[Array, "B T D"], RouterOutput]:
        """Routes tokens and applies the experts; `replay` is this layer's routing, without `L`."""
        config = self.config
        with jax.named_scope("route"):
            logits = jnp.einsum(
                "btd,de->bte",
                x.astype(jnp.float32),
                read(self.router, jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            bias = read(self.selection_bias, jnp.float32) if config.selection_bias else None
            live = choose(logits, bias, config)
            chosen = live if replay is None else replayed(live, replay)
            gates, confidence = gate_weights(logits, chosen, config)
        params = self.gate, self.up, self.down
        y = mixture(params, x, real, chosen, gates.astype(x.dtype), config, layout)
        if config.num_shared_experts:
            with jax.named_scope("shared"):
                y = y + self.shared(x)
        dtype = expert_dtype(config.num_experts)
        with jax.named_scope("load"):
            # `bincount` would flatten, and therefore gather, the sharded rows and columns.
            counted = jnp.where(real[..., None], chosen, config.num_experts)
            load = jnp.zeros(config.num_experts, jnp.int32).at[counted].add(1, mode="drop")
        return y, RouterOutput(
            chosen.astype(dtype), live.astype(dtype), confidence, load.astype(jnp.float32)
        )
