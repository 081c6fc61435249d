"""Our side of the comparison with TRL: computes losses, metrics and advantages of a case."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable import corrections
from jaxrl_stable.objectives import (
    aggregate,
    cispo,
    divide,
    kl_penalty,
    sapo,
    vespo,
)
from tests.objectives.trl_cases import GROUP, ROWS, TOLERANCES, Advantage, Batch, Loss


def settings(case: Loss | Advantage) -> dict[str, Any]:
    """Returns everything that TRL's side depends on."""
    names = ("trl", "trainer", "off_policy", "token_advantages", "tools", "all_scored")
    return {name: getattr(case, name) for name in names if name in case._fields}


def stack(results: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks one result per batch into arrays with the batch as first axis."""
    results = list(results)
    return {key: np.stack([result[key] for result in results]) for key in results[0]}


def differences(case: Loss, actual: dict, expected: dict) -> dict[str, float]:
    """Returns the largest difference, relative to the largest entry."""
    compared = actual.keys() - (set() if case.same_value else {"loss"})
    return {key: relative(actual[key], expected[key]) for key in sorted(compared)}


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    assert np.shape(actual) == np.shape(expected)
    largest = np.max(np.abs(expected))
    return float(np.max(np.abs(actual - expected)) / (largest or 1.0))


def tolerance(key: str, dtype: str) -> float:
    """TRL computes its metrics in float32."""
    return TOLERANCES[dtype if key in ("loss", "gradient") else "float32"]


def given(batches: Iterable[Batch], dtype: str) -> Batch:
    """Returns all batches at once, in this precision, with one more axis than `Batch` says."""
    arrays = stack(batch._asdict() for batch in batches)
    return Batch(*(x.astype(dtype) if x.dtype == np.float64 else x for x in arrays.values()))


def our_losses(
    case: Loss, batches: Iterable[Batch], dtype: str = "float64"
) -> dict[str, np.ndarray]:
    """Returns each batch's loss, gradient by log π_θ, and the metrics we define as TRL does."""
    with jax.enable_x64(dtype == "float64"):
        results = jax.vmap(functools.partial(_our_loss, case))(given(batches, dtype))
        return jax.tree.map(np.asarray, results)


def _our_loss(case: Loss, batch: Batch) -> dict[str, jax.Array]:
    mask = batch.mask & batch.spoken if case.tools else batch.mask
    if "mask_truncated_completions" in case.trl:
        mask &= batch.finished[:, None]
    old = batch.old if case.off_policy else None
    advantages = batch.token_advantages if case.token_advantages else batch.advantages

    def loss_and_metrics(logp):
        arrays = logp, old, batch.rollout, advantages, mask
        out = case.objective(*arrays, **case.options)
        metrics = _metrics(case, out, mask, advantages)
        for correction, options in case.corrections:
            factor = correction(*arrays, **options)
            out = corrections.correct(out, factor)
        if "vllm_importance_sampling_mode" in case.trl and case.corrections:
            whole = case.trl["vllm_importance_sampling_mode"].startswith("sequence")
            metrics["sampling/importance_sampling_ratio/mean"] = _mean(factor, mask, whole)
        loss = out.loss
        if case.kl is not None:
            kl = kl_penalty(logp, batch.reference, mask, logp_old=old if case.unbiased_kl else None)
            loss += case.kl * kl
            metrics["kl"] = _mean(kl, mask)
        horizon = case.trl.get("max_completion_length")
        loss = divide(*aggregate(loss, mask, case.aggregation, horizon))
        return loss * (jnp.mean(mask.any(-1)) if case.all_rows else 1.0), metrics

    (loss, metrics), gradient = jax.value_and_grad(loss_and_metrics, has_aux=True)(batch.logp)
    return dict(loss=loss, gradient=gradient, **metrics)


def _metrics(case: Loss, out, mask: jax.Array, advantages: jax.Array) -> dict[str, jax.Array]:
    """Returns metrics by TRL's names; values per response are averaged over responses."""
    whole = case.trl.get("importance_sampling_level") == "sequence"
    if case.objective is sapo:
        return {}
    if case.objective is vespo:
        return {"vespo/phi_seq_mean": _mean(out.weight, mask, True)}
    if case.objective is cispo:
        return {"cispo_clip_ratio": _mean(out.truncated & (advantages[:, None] > 0), mask)}
    metrics = {"clip_ratio/high_mean": _mean(out.clipped_high, mask, whole)}
    if "dual_clip" not in case.options:  # we count what it silences, TRL does not
        metrics["clip_ratio/low_mean"] = _mean(out.clipped_low, mask, whole)
    return metrics


def _mean(x: jax.Array, mask: jax.Array, whole: bool = False) -> jax.Array:
    """Averages over tokens, or over responses whose tokens all have the same value."""
    return jnp.mean(x[:, 0]) if whole else jnp.sum(x * mask) / jnp.sum(mask)


def our_advantages(case: Advantage, batches: Iterable[Batch], dtype: str = "float64") -> np.ndarray:
    with jax.enable_x64(dtype == "float64"):
        return np.asarray(jax.vmap(functools.partial(_our_advantages, case))(given(batches, dtype)))


def _our_advantages(case: Advantage, batch: Batch) -> jax.Array:
    valid = jnp.ones(ROWS, bool) if case.all_scored else batch.scored
    distance = kl_penalty(batch.old, batch.reference, batch.mask, "k1").sum(-1)
    rewards = batch.rewards.at[:, 0].add(-case.kl * distance)
    rewards = jnp.where(valid[:, None], rewards, jnp.nan)
    return case.ours(rewards, jnp.arange(ROWS) // GROUP, valid)
