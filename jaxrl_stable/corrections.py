"""Corrections for the mismatch between sampler and trainer, on top of any objective.

A correction takes an objective's arrays and returns one constant factor per token. A factor of 0
drops the token from the gradient, but never from a denominator. Factors of several corrections are
multiplied; `correct` applies one:

    out = gspo(logp, logp_old, logp_rollout, advantages, mask)
    out = correct(out, token_tis(logp, logp_old, logp_rollout, advantages, mask, cap=2.0))

w = π_old/μ_old is the mismatch of a token, and W = Π_t w_t is the mismatch of a response. Only W is
unbiased (https://yingru.notion.site "When Speed Kills Stability"). A weight per token is biased to
first order but has far less variance; `study.tabular` measures both. MiniRL and DPPO already weight
by the mismatch, so combine them with masks, not with a second weight.

Example: one response with w = 2 and 4, so W = 8 and the geometric mean is 2.83:

>>> logp_old, logp_rollout = jnp.log(jnp.array([[0.5, 0.8]])), jnp.log(jnp.array([[0.25, 0.2]]))
>>> arrays = logp_old, logp_old, logp_rollout, jnp.array([1.0]), jnp.ones((1, 2), bool)
>>> def show(factor):
...     print([round(float(x), 2) for x in factor[0]])
>>> show(token_tis(*arrays, cap=3.0))
[2.0, 3.0]
>>> show(sequence_tis(*arrays, cap=10.0))
[8.0, 8.0]
>>> show(icepop(*arrays, high=3.0))
[2.0, 0.0]
>>> show(sequence_mis(*arrays, high=10.0))
[8.0, 8.0]
>>> show(geometric_mask(*arrays, high=2.9))
[1.0, 1.0]
>>> show(veto(*arrays, threshold=3.0))
[0.0, 0.0]
>>> show(normalized_token_tis(*arrays, cap=3.0))
[0.8, 1.2]
>>> show(normalized_sequence_tis(*arrays, cap=10.0))
[1.0, 1.0]

A bad response whose tokens have become half as likely (log 2 = .69) is dropped:

>>> bad = logp_old - jnp.log(2.0), logp_old, logp_old, jnp.array([-1.0]), jnp.ones((1, 2), bool)
>>> show(off_policy_sequence_mask(*bad, delta=0.5))
[0.0, 0.0]
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


def correct(token_loss: TokenLoss, factor: Float[Array, "*B T"]) -> TokenLoss:
    """Multiplies a token loss and its weight by a correction's factors.

    Args:
      token_loss: result of an objective.
      factor: constant factors; 0 drops a token.

    Returns:
      The corrected token loss.

    Raises:
      ValueError: if factor and loss differ in shape.

    Example:
      >>> ones, no = jnp.ones((1, 2)), jnp.zeros((1, 2), bool)
      >>> plain = TokenLoss(ones, 0 * ones, ones, no, no, no)
      >>> out = correct(plain, jnp.array([[2.0, 0.0]]))
      >>> print(out.loss, out.weight)
      [[2. 0.]] [[2. 0.]]
    """
    check_same_shape("correct", "*B T", loss=token_loss.loss, factor=factor)
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
    """Returns min(w, C) per token: truncated importance sampling.

    Source: Yao et al., https://fengyao.notion.site/off-policy-rl.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: as passed to the objective. If `logp_old` is
        None, π_old is π_θ.
      cap: C; 2 is common.
      floor: lower bound on w, or None.

    Returns:
      Constant factors, 0 outside the mask.

    Raises:
      ValueError: if the bounds are invalid (0 < floor < cap).
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
    """Returns min(W, C), the truncated product over the response. Caps of 2 to 10 are common.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      cap: C.

    Returns:
      Constant factors, equal within a response; 0 outside the mask.

    Raises:
      ValueError: if the cap is not positive.
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
    """Returns w · 1[low ≤ w ≤ high] per token: tokens outside the bounds are dropped.

    Source: IcePop, https://ringtech.notion.site/icepop, which we know only from the documentation
    of other frameworks. Their bounds differ: .5 to 5 (verl), .5 to 2 (SkyRL), up to 3 (TRL's
    `token_mask`). The bounds apply to the ratio of trainer to sampler.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      low, high: bounds on w.
      weigh: whether to also multiply by w; if False, only the mask is applied (as in SkyRL).

    Returns:
      Constant factors, 0 outside the mask.

    Raises:
      ValueError: if the bounds are invalid (0 ≤ low < high).
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
    """Returns W · 1[low ≤ W ≤ high]: masked importance sampling with one weight per response.

    This is TRL's default, with high = 3.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      low, high: bounds on W.
      weigh: whether to also multiply by W.

    Returns:
      Constant factors, equal within a response; 0 outside the mask.

    Raises:
      ValueError: if the bounds are invalid (0 ≤ low < high).
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
    """Returns 1[ low ≤ W^(1/|y|) ≤ high ]: drops responses with a large average mismatch.

    verl uses bounds of .999 to 1.001, SkyRL .99 to 1.01.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      low, high: bounds on the geometric mean.

    Returns:
      Constant factors of 0 or 1, equal within a response; 0 outside the mask.

    Raises:
      ValueError: if the bounds are invalid (0 ≤ low < high).
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
    """Returns 0 for a response if the trainer finds any of its tokens nearly impossible, else 1.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      threshold: smallest plausible w; 1e-4 to 1e-6 is common (slime used to have this correction).

    Returns:
      Constant factors of 0 or 1, equal within a response; 0 outside the mask.

    Raises:
      ValueError: if the threshold is not positive.
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
    """Returns 0 where Â < 0 and mean_t(log μ_old − log π_θ) > δ, else 1.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556. The mask drops bad responses that the
    policy has already unlearned. We do not know the paper's δ; TRL's example uses .5, and
    ARLArena's code uses .223.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      delta: δ, in nats.

    Returns:
      Constant factors of 0 or 1; 0 outside the mask.
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
    """Returns `token_tis` divided by its mini-batch mean, so truncation does not shrink the step.

    This form is verl's. The mean is over all tokens in the call, so pass the whole mini-batch.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      cap: C.

    Returns:
      Constant factors with a mean of 1 over the response tokens; 0 outside the mask.

    Raises:
      ValueError: if the cap is not positive.
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
    """Returns `sequence_tis` divided by its mini-batch mean, in which each response counts once.

    This form is verl's. The mean is over all responses in the call, so pass the whole mini-batch.

    Args:
      logp, logp_old, logp_rollout, advantages, mask: see `token_tis`.
      cap: C.

    Returns:
      Constant factors with a mean of 1 over the responses; 0 outside the mask.

    Raises:
      ValueError: if the cap is not positive.
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
    """Returns log w without a gradient; 0 outside the mask."""
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
    """Checks that 0 < lower < upper, each a (name, value) pair; raises ValueError if not."""
    bounds = [bound for bound in (lower, upper) if bound is not None]
    values = [value for _, value in bounds]
    if min(values) <= 0 or (len(values) == 2 and values[0] >= values[1]):
        shown = ", ".join(f"{option}={value}" for option, value in bounds)
        raise ValueError(f"{name}: {shown} must bound a ratio; use positive, increasing values")


def _constant(factor: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return jax.lax.stop_gradient(jnp.where(mask, factor, 0.0))
