"""CAPO: drops tokens for which the optimiser's next step looks unsafe.

A step Δψ of the output head's matrix changes the logits at one position by u = h Δψ. For the
softmax π at that position and the sampled token a, the paper's quadratic forms need only

    c = u_a − E_π[u],    E_π[(e_a − π)ᵀ u]² = c²,    uᵀ F u = Var_π[u]

so no Kronecker product is ever formed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float, Int
from jaxrl_stable.importance import at_least_float32
from jaxrl_stable.objectives.ppo import ppo
from jaxrl_stable.objectives.token_loss import TokenLoss, check_shapes, per_token


class CapoHead(NamedTuple):
    """Inputs to the output head, and the step that the optimiser is about to take.

    Attributes:
      hidden: head input at each scored token.
      weight: ψ; the logits are `hidden @ weight / temperature`.
      step: Δψ, the optimiser's next update of ψ: α p̂ / (√q̂ + ε), from Adam's moments p and q of
        the objective's gradient. Negate it if the moments come from the gradient of a loss.
      tokens: the scored tokens.
      temperature: the policy's sampling temperature.
    """

    hidden: Float[Array, "B T D"]
    weight: Float[Array, "D V"]
    step: Float[Array, "D V"]
    tokens: Int[Array, "B T"]
    temperature: float = 1.0


class Curvature(NamedTuple):
    """Predicted effect of the step, per token: m_H on the objective, m_F on the policy."""

    objective: Float[Array, "B T"]
    policy: Float[Array, "B T"]


def curvature(
    head: CapoHead,
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    discount: float = 1.0,
) -> Curvature:
    """Returns m_H = g̃ᵀΔψ + ½ ΔψᵀH̃Δψ and m_F = ½ ΔψᵀF̃Δψ per token.

        m_H = γ^t Â ( c + ½ (c² − Var_π[u]) ),    m_F = ½ c²

    Source: https://arxiv.org/abs/2510.00819. The function materialises `[B, T, V]` logits twice; if
    that needs too much memory, pass a few rows at a time.

    Args:
      head: input, weight and step of the output head.
      advantages: one per response, or one per token.
      mask: response tokens.
      discount: γ; t counts from the first response token.

    Returns:
      m_H and m_F; gradients are stopped.
    """
    hidden, weight, step = map(at_least_float32, (head.hidden, head.weight, head.step))
    hidden = jnp.where(mask[..., None], hidden, 0.0)
    probabilities = jax.nn.softmax(hidden @ weight / head.temperature)
    u = hidden @ step / head.temperature
    mean = (probabilities * u).sum(-1)
    variance = (probabilities * jnp.square(u - mean[..., None])).sum(-1)
    c = jnp.take_along_axis(u, head.tokens[..., None], -1)[..., 0] - mean
    t = jnp.cumsum(mask, -1) - 1
    scale = per_token(advantages, mask) * discount ** jnp.maximum(t, 0).astype(c.dtype)
    objective = scale * (c + 0.5 * (jnp.square(c) - variance))
    return jax.lax.stop_gradient(Curvature(objective, 0.5 * jnp.square(c)))


def capo(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    head: CapoHead,
    *,
    hessian: tuple[float, float] = (-0.01, 0.01),
    fisher: float = 1e-4,
    discount: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> TokenLoss:
    """PPO's token loss, restricted to tokens with δ_low ≤ m_H ≤ δ_high and m_F ≤ δ_F.

    Source: https://arxiv.org/abs/2510.00819. This is the only objective that needs more than
    log-probabilities, so it has its own signature. Published thresholds (δ_F / ±δ_H): CAPO (GRPO's
    loss) 1e-4 / .01, Dr.CAPO 1e-3 / 5e-4, ReinCAPO 1e-5 / .1. We have not checked the paper itself;
    our sources are a secondary note and the authors' repository. Dropped tokens stay in the
    denominators and count as clipped.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; `logp_rollout` is unused.
      head: see `CapoHead`; treated as constant.
      hessian: δ_low and δ_high, bounds on m_H.
      fisher: δ_F, bound on m_F.
      discount: γ.
      clip_low, clip_high: see `ppo`.

    Returns:
      The token loss, before `aggregate`.

    Raises:
      ValueError: if the clip bounds are invalid (0 < clip_low < 1, clip_high > 0).
    """
    check_shapes("capo", logp, logp_old, logp_rollout, advantages, mask)
    out = ppo(
        logp,
        logp_old,
        logp_rollout,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    found = curvature(jax.lax.stop_gradient(head), advantages, mask, discount)
    unsafe = (found.objective < hessian[0]) | (found.objective > hessian[1])
    unsafe = mask & (unsafe | (found.policy > fisher))
    advantages = per_token(advantages, mask)
    return out._replace(
        loss=jnp.where(unsafe, 0.0, out.loss),
        clipped_high=out.clipped_high | (unsafe & (advantages > 0)),
        clipped_low=out.clipped_low | (unsafe & (advantages < 0)),
    )
