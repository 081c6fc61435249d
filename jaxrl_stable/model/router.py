"""Router: the choice of experts per token, its replay (R2, R3), and the gate weights.

Choice and gates are separate functions because replay replaces only the choice. Gates are always
gathered from the live, dense scores at the chosen indices, never from a masked copy. So an expert
that the live router would not have chosen still has a non-zero gate and receives a gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.routing import Routing


def choose(
    logits: Float[Array, "... E"], bias: Float[Array, "E"] | None, config: ModelConfig
) -> Int[Array, "... K"]:
    """Returns the live choice: the K best experts, best first.

    Softmax routers rank by logits (softmax is monotonic), sigmoid routers by σ(s) + bias. With
    groups, only the `chosen_groups` groups whose two best biased scores have the largest sums are
    eligible (DeepSeek-V3, arXiv:2412.19437, §2.1.2).
    """
    ranked = logits if config.router_score == "softmax" else jax.nn.sigmoid(logits)
    if bias is not None:
        ranked = ranked + bias
    if config.expert_groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], config.expert_groups, -1)
        strength = jax.lax.top_k(grouped, 2)[0].sum(-1)
        _, best = jax.lax.top_k(strength, config.chosen_groups)
        allowed = jax.nn.one_hot(best, config.expert_groups, dtype=bool).any(-2)
        ranked = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    return jax.lax.top_k(ranked, config.num_experts_per_token)[1]


def replayed(live: Int[Array, "B T K"], replay: Routing) -> Int[Array, "B T K"]:
    """Replaces the live choice (Routing Replay, https://arxiv.org/abs/2512.01374, §3).

    Args:
      live: the router's own choice, which is kept where the replayed routing is not valid.
      replay: routing of this layer, without `L`: e^π_old under R2, e^μ under R3.
    """
    return jnp.where(replay.valid[..., None], replay.experts.astype(live.dtype), live)


def gate_weights(
    logits: Float[Array, "... E"], chosen: Int[Array, "... K"], config: ModelConfig
) -> tuple[Float[Array, "... K"], Float[Array, "..."]]:
    """Computes the gates of the chosen experts from the live scores, in float32.

        p = softmax(s)  or  σ(s)         g_k = p_{i_k} / Σ_j p_{i_j}   or   g_k = p_{i_k}

    depending on `router_score` and `norm_topk_prob`, times `routed_scaling`. Bias and groups do not
    affect the gates, as in transformers' `Qwen3MoeTopKRouter` and `DeepseekV3TopkRouter`.

    Normalised gates are computed as a softmax over K log scores. In exact arithmetic this is the
    same quantity. It stays finite if replayed experts have vanishing scores, so DeepSeek's 1e-20 in
    the denominator is not needed (Ma et al., arXiv:2510.11370).

    Returns:
      The gates, and the chosen experts' share of the sum of all E scores.
    """
    softmax = config.router_score == "softmax"
    log_scores = logits if softmax else jax.nn.log_sigmoid(logits)  # up to a constant
    total = jax.nn.logsumexp(log_scores, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(log_scores, chosen, axis=-1)
    share = jnp.exp(picked - total).sum(-1)
    if config.norm_topk_prob:
        gates = jax.nn.softmax(picked, axis=-1)
    else:
        gates = jnp.exp(picked - total if softmax else picked)
    return gates * config.routed_scaling, share
