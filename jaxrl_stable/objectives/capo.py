"""CAPO: drop the tokens whose step of the output head would be curved or large.

A step Δψ of the head's matrix changes the logits of one token by u = h Δψ. With the softmax π of
that token and its sampled entry a, everything that the paper's quadratic forms need is

    c = u_a − E_π[u],    E_π[(e_a − π)ᵀ u]² = c²,    uᵀ F u = Var_π[u]

so that no Kronecker product is ever formed.
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
    """What the output head saw and where the optimiser is about to move it.

    Attributes:
      hidden: its input for each scored token.
      weight: ψ, logits are `hidden @ weight / temperature`.
      step: Δψ, what the optimiser is about to add to ψ: α p̂ / (√q̂ + ε) of Adam's moments of the
        objective's gradient, or minus that of a loss's.
      tokens: the scored tokens.
      temperature: of the policy.
    """

    hidden: Float[Array, "B T D"]
    weight: Float[Array, "D V"]
    step: Float[Array, "D V"]
    tokens: Int[Array, "B T"]
    temperature: float = 1.0


class Curvature(NamedTuple):
    """Predicted effect of the step on one token: m_H of the objective, m_F of the policy."""

    objective: Float[Array, "B T"]
    policy: Float[Array, "B T"]


def curvature(
    head: CapoHead, advantages: Float[Array, "B"], mask: Bool[Array, "B T"], discount: float = 1.0
) -> Curvature:
    """m_H = g̃ᵀΔψ + ½ ΔψᵀH̃Δψ and m_F = ½ ΔψᵀF̃Δψ, token by token (arXiv:2510.00819).

        m_H = γ^t Â ( c + ½ (c² − Var_π[u]) ),    m_F = ½ c²

    `[B, T, V]` logits are formed twice; give the rows in pieces where that is too much.

    Args:
      head: input, weight and step of the output head.
      advantages: one a response.
      mask: response tokens.
      discount: γ; t counts from the first response token.
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
    """PPO's token loss on the tokens with δ_low ≤ m_H ≤ δ_high and m_F ≤ δ_F (arXiv:2510.00819).

    The one objective that arrays of log-probabilities do not suffice for; hence a signature of its
    own. Published thresholds (δ_F / ±δ_H): CAPO (GRPO's loss) 1e-4 / .01, Dr.CAPO 1e-3 / 5e-4,
    ReinCAPO 1e-5 / .1. Not fully known: a note on the paper and the authors' repository are the
    sources. Rejected tokens stay in the denominators and count as clipped.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `minirl`; μ_old is not looked at.
      head: see `CapoHead`; constants.
      hessian: δ_low and δ_high of m_H.
      fisher: δ_F of m_F.
      discount: γ.
      clip_low, clip_high: see `ppo`.

    Raises:
      ValueError: bounds that are none.
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
