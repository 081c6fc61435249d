"""Feed-forward layers: the dense SwiGLU, and the mixture of experts with its router.

Replay replaces the discrete choice only. Gate weights are always gathered from the live, dense
router scores at the chosen indices, never from a masked copy: an index that the live router would
not have picked still has a non-zero gate and passes its gradient on.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt

from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.dispatch import (
    block_rows,
    experts_implementation,
    gather_rows,
    group_by_expert,
    grouped_matmul,
    scatter_rows,
)
from jaxrl_stable.model.parameters import matrix, read
from jaxrl_stable.routing import Routing, expert_dtype


class RouterOutput(NamedTuple):
    """What the routers did, of all layers (leading `L`) or of one (without).

    Attributes:
      experts: the experts used, in slot order.
      live: the live router's own choice; equals `experts` where nothing was replayed.
      confidence: probability mass (softmax over all E) of the experts used.
      load: number of (token, choice) pairs of each expert; padding is left out.
    """

    experts: UInt[Array, "*L B T K"]
    live: UInt[Array, "*L B T K"]
    confidence: Float[Array, "*L B T"]
    load: Float[Array, "*L E"]


class FeedForward(nnx.Module):
    """Dense SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None):
        D, F = config.hidden_size, config.intermediate_size
        options = dict(stack=stack, dtype=config.param_dtype)
        gain = (2 * config.num_layers) ** -0.5
        self.gate = matrix(rngs, {"embed": D, "mlp": F}, ("embed",), **options)
        self.up = matrix(rngs, {"embed": D, "mlp": F}, ("embed",), **options)
        self.down = matrix(rngs, {"mlp": F, "embed": D}, ("mlp",), gain=gain, **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = x @ read(self.gate, x.dtype), x @ read(self.up, x.dtype)
        return (jax.nn.silu(gate) * up) @ read(self.down, x.dtype)


class Experts(nnx.Module):
    """Qwen3-MoE block: softmax router, top-K, SwiGLU experts, no token dropped."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: int | None):
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        options = dict(stack=stack, dtype=config.param_dtype)
        gain = (2 * config.num_layers) ** -0.5
        into, out = {"expert": E, "embed": D, "mlp": F}, {"expert": E, "mlp": F, "embed": D}
        self.config = config
        self.router = matrix(rngs, {"embed": D, "router": E}, ("embed",), **options)
        self.gate = matrix(rngs, into, ("embed",), **options)
        self.up = matrix(rngs, into, ("embed",), **options)
        self.down = matrix(rngs, out, ("mlp",), gain=gain, **options)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], replay: Routing | None
    ) -> tuple[Float[Array, "B T D"], RouterOutput]:
        """Applies the experts; `replay` is the routing of this layer (no leading `L`)."""
        config = self.config
        logits = jnp.einsum(
            "btd,de->bte",
            x.astype(jnp.float32),
            read(self.router, jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        _, live = jax.lax.top_k(logits, config.num_experts_per_token)
        chosen = live
        if replay is not None:
            chosen = jnp.where(replay.valid[..., None], replay.experts.astype(live.dtype), live)
        gates, confidence = gate_weights(logits, chosen, config.norm_topk_prob)
        y = self._mix(x, real, chosen, gates.astype(x.dtype))
        dtype = expert_dtype(config.num_experts)
        counted = jnp.where(real[..., None], chosen, config.num_experts).reshape(-1)
        load = jnp.bincount(counted, length=config.num_experts + 1)[:-1].astype(jnp.float32)
        return y, RouterOutput(chosen.astype(dtype), live.astype(dtype), confidence, load)

    def _mix(self, x, real, chosen, gates):
        """Weighted sum of the chosen experts' outputs; zero for padding tokens."""
        config = self.config
        tokens, k = x.reshape(-1, x.shape[-1]), config.num_experts_per_token
        chosen, gates = chosen.reshape(-1, k), gates.reshape(-1, k)
        gate, up, down = (read(w, x.dtype) for w in (self.gate, self.up, self.down))
        implementation = experts_implementation(config)
        if implementation == "dense":
            hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", tokens, gate))
            every = jnp.einsum("nef,efd->ned", hidden * jnp.einsum("nd,edf->nef", tokens, up), down)
            outputs = jnp.take_along_axis(every, chosen[..., None], axis=1)
        else:
            block = 1
            if implementation == "blocked":
                block = block_rows(chosen.size, config.num_experts)
            groups = group_by_expert(chosen, real.reshape(-1), config.num_experts, block)
            rows = scatter_rows(tokens, groups.source, groups.slot)
            hidden = jax.nn.silu(grouped_matmul(rows, gate, groups, implementation))
            hidden = hidden * grouped_matmul(rows, up, groups, implementation)
            rows = grouped_matmul(hidden, down, groups, implementation)
            outputs = gather_rows(rows, groups.source, groups.slot)
        mixed = jnp.einsum("nkd,nk->nd", outputs, gates).reshape(x.shape)
        return jnp.where(real[..., None], mixed, 0)


def gate_weights(
    logits: Float[Array, "... E"], chosen: Array, norm_topk_prob: bool
) -> tuple[Float[Array, "... K"], Float[Array, "..."]]:
    """Gates of the chosen experts from the live scores, in float32.

        p = softmax(s),   g_k = p_{i_k} / Σ_j p_{i_j}   (`norm_topk_prob`)   or   g_k = p_{i_k}

    The normalised form is computed as the softmax of the K gathered logits: equal in exact
    arithmetic, and finite when replayed experts have vanishing probability (Ma et al.,
    arXiv:2510.11370; the arithmetic of `Qwen3MoeSparseMoeBlock`).

    Returns:
      The gates, and the probability mass of the chosen experts.
    """
    picked = jnp.take_along_axis(logits, chosen, axis=-1)
    mass = jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    gates = jax.nn.softmax(picked, axis=-1) if norm_topk_prob else mass
    return gates, mass.sum(-1)
