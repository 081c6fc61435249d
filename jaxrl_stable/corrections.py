"""Corrections of the mismatch between sampler and trainer, on top of any objective.

A correction takes the arrays of an objective and gives one constant factor a token: 0 drops the
token from the gradient (never from a denominator). Factors multiply; `correct` applies one:

    out = gspo(logp, logp_old, logp_rollout, advantages, mask)
    out = correct(out, token_tis(logp, logp_old, logp_rollout, advantages, mask, cap=2.0))

w = π_old/μ_old is the mismatch of a token, W = Π_t w_t that of a response. The product alone is
unbiased (https://yingru.notion.site "When Speed Kills Stability"); a weight a token has a bias of
first order and far less noise: `tabular` measures both. MiniRL and DPPO carry the mismatch in their
own weight: give them masks, not a second weight.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float
from jaxrl_stable.importance import LOG_RATIO_BOUND, bounded, log_ratio, response_mean
from jaxrl_stable.objectives.token_loss import (
    TokenLoss,
    check_same_shape,
    check_shapes,
    per_token,
    repeated,
    traits,
)


def correct(token_loss: TokenLoss, factor: Float[Array, "B T"]) -> TokenLoss:
    """The loss and its weight, multiplied by the factors of a correction."""
    check_same_shape("correct", "B T", loss=token_loss.loss, factor=factor)
    factor = jax.lax.stop_gradient(factor)
    return token_loss._replace(loss=token_loss.loss * factor, weight=token_loss.weight * factor)


@traits(weighs_mismatch=True, needs_mismatch=True)
def token_tis(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float = 2.0,
    floor: float | None = None,
) -> Float[Array, "B T"]:
    """min(w, C), truncated importance sampling (Yao et al., https://fengyao.notion.site/off-policy-rl).

    Args:
      logp, logp_old, logp_rollout, advantages, mask: as given to the objective. Without `logp_old`,
        π_old is π_θ.
      cap: C; 2 is usual.
      floor: smallest weight, or None.
    """
    check_shapes("token_tis", logp, logp_old, logp_rollout, advantages, mask)
    _check("token_tis", None if floor is None else ("floor", floor), ("cap", cap))
    lower = -LOG_RATIO_BOUND if floor is None else math.log(floor)
    log_w = jnp.clip(_mismatch(logp, logp_old, logp_rollout, mask), min=lower, max=math.log(cap))
    return _constant(jnp.exp(log_w), mask)


@traits(weighs_mismatch=True, needs_mismatch=True)
def sequence_tis(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float = 2.0,
) -> Float[Array, "B T"]:
    """min(W, C): the product over the response, truncated. Caps of 2 to 10 are usual.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      cap: C.
    """
    check_shapes("sequence_tis", logp, logp_old, logp_rollout, advantages, mask)
    _check("sequence_tis", None, ("cap", cap))
    log_w = _mismatch(logp, logp_old, logp_rollout, mask).sum(-1)
    weight = jnp.exp(jnp.clip(log_w, min=-LOG_RATIO_BOUND, max=math.log(cap)))
    return jax.lax.stop_gradient(repeated(weight, mask))


@traits(weighs_mismatch=lambda weigh, **_: weigh, needs_mismatch=True)
def icepop(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: float = 0.5,
    high: float = 5.0,
    weigh: bool = True,
) -> Float[Array, "B T"]:
    """w · 1[low ≤ w ≤ high]: tokens outside are dropped (IcePop, https://ringtech.notion.site/icepop).

    The blog was read through the documentation of frameworks only, whose bounds differ: .5 to 5
    (verl), .5 to 2 (SkyRL), up to 3 (TRL's `token_mask`). Bounds are of trainer over sampler.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      low, high: bounds of w.
      weigh: multiply by w as well; False is the mask alone (SkyRL's).
    """
    check_shapes("icepop", logp, logp_old, logp_rollout, advantages, mask)
    log_w = _mismatch(logp, logp_old, logp_rollout, mask)
    return _inside("icepop", log_w, low, high, weigh, mask)


@traits(weighs_mismatch=lambda weigh, **_: weigh, needs_mismatch=True)
def sequence_mis(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: float = 0.0,
    high: float = 3.0,
    weigh: bool = True,
) -> Float[Array, "B T"]:
    """W · 1[low ≤ W ≤ high]: masked importance sampling of whole responses (TRL's default, high 3).

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      low, high: bounds of W.
      weigh: multiply by W as well.
    """
    check_shapes("sequence_mis", logp, logp_old, logp_rollout, advantages, mask)
    log_w = repeated(_mismatch(logp, logp_old, logp_rollout, mask).sum(-1), mask)
    return _inside("sequence_mis", log_w, low, high, weigh, mask)


@traits(needs_mismatch=True)
def geometric_mask(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: float = 0.999,
    high: float = 1.001,
) -> Float[Array, "B T"]:
    """1[ low ≤ W^(1/|y|) ≤ high ]: drops responses whose tokens disagree in the mean.

    Bounds of .999 to 1.001 are verl's, .99 to 1.01 SkyRL's.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      low, high: bounds of the geometric mean.
    """
    check_shapes("geometric_mask", logp, logp_old, logp_rollout, advantages, mask)
    log_w = repeated(response_mean(_mismatch(logp, logp_old, logp_rollout, mask), mask), mask)
    return _inside("geometric_mask", log_w, low, high, False, mask)


@traits(needs_mismatch=True)
def veto(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    threshold: float = 1e-4,
) -> Float[Array, "B T"]:
    """0 for a whole response if the trainer holds any of its tokens for next to impossible.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      threshold: smallest w that is believed; 1e-4 to 1e-6 are usual (slime, once).
    """
    check_shapes("veto", logp, logp_old, logp_rollout, advantages, mask)
    _check("veto", None, ("threshold", threshold))
    log_w = _mismatch(logp, logp_old, logp_rollout, mask)
    vetoed = (mask & (log_w < math.log(threshold))).any(-1, keepdims=True)
    return _constant(jnp.where(vetoed, jnp.zeros_like(log_w), 1.0), mask)


def off_policy_sequence_mask(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    delta: float = 0.5,
) -> Float[Array, "B T"]:
    """0 where Â < 0 and mean_t(log μ_old − log π_θ) > δ (DeepSeek-V3.2, arXiv:2512.02556).

    What the policy has already unlearnt teaches it no more. The paper's δ is not known to us; .5 is
    TRL's example, ARLArena's code has .223.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      delta: δ, nats.
    """
    check_shapes("off_policy_sequence_mask", logp, logp_old, logp_rollout, advantages, mask)
    distance = repeated(response_mean(log_ratio(logp_rollout, logp, mask), mask), mask)
    stale = (per_token(advantages, mask) < 0) & (distance > delta)
    return _constant(jnp.where(stale, jnp.zeros_like(distance), 1.0), mask)


@traits(weighs_mismatch=True, needs_mismatch=True, whole_batch=True)
def normalized_token_tis(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float = 2.0,
) -> Float[Array, "B T"]:
    """`token_tis` over its mean in the mini-batch: truncation no longer shrinks the step (verl).

    Decides on all the tokens it is given, which have to be those of the whole mini-batch.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      cap: C.
    """
    check_shapes("normalized_token_tis", logp, logp_old, logp_rollout, advantages, mask)
    weight = token_tis(logp, logp_old, logp_rollout, advantages, mask, cap=cap)
    return weight / jnp.maximum(weight.sum() / jnp.maximum(mask.sum(), 1), 1e-8)


@traits(weighs_mismatch=True, needs_mismatch=True, whole_batch=True)
def normalized_sequence_tis(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float = 2.0,
) -> Float[Array, "B T"]:
    """`sequence_tis` over its mean in the mini-batch, responses counting alike (verl).

    Decides on all the responses it is given, which have to be those of the whole mini-batch.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      cap: C.
    """
    check_shapes("normalized_sequence_tis", logp, logp_old, logp_rollout, advantages, mask)
    weight = sequence_tis(logp, logp_old, logp_rollout, advantages, mask, cap=cap)
    responses = mask.any(-1).sum()
    return weight / jnp.maximum(weight.max(-1).sum() / jnp.maximum(responses, 1), 1e-8)


def _mismatch(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"] | None,
    logp_rollout: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """log w, a constant; 0 outside the mask."""
    old = logp if logp_old is None else logp_old
    return jax.lax.stop_gradient(log_ratio(old, logp_rollout, mask))


def _inside(
    name: str,
    log_w: Float[Array, "B T"],
    low: float,
    high: float,
    weigh: bool,
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    _check(name, ("low", low) if low else None, ("high", high))
    lower = math.log(low) if low else -math.inf
    upper = math.log(high)
    weight = jnp.exp(bounded(log_w)) if weigh else jnp.ones_like(log_w)
    return _constant(jnp.where((log_w >= lower) & (log_w <= upper), weight, 0.0), mask)


def _check(name: str, lower: tuple[str, float] | None, upper: tuple[str, float]) -> None:
    """Raises ValueError unless 0 < lower < upper, each a name and its value."""
    bounds = [bound for bound in (lower, upper) if bound is not None]
    values = [value for _, value in bounds]
    if min(values) <= 0 or (len(values) == 2 and values[0] >= values[1]):
        shown = ", ".join(f"{option}={value}" for option, value in bounds)
        raise ValueError(f"{name}: {shown} bounds a ratio; use positive ones, the lower one first")


def _constant(factor: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return jax.lax.stop_gradient(jnp.where(mask, factor, 0.0))
