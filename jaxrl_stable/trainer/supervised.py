"""Supervised step: maximum likelihood of the answers in packed demonstrations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import Mean, Metrics
from jaxrl_stable.model.head import next_token_log_probs
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.trainer.optimizer import TrainState, apply_gradients


def supervised_update(
    state: TrainState, batch: dict[str, Array], *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """Takes one step on the mean negative log-likelihood of the answer tokens in packed rows.

        L = − Σ m_t log π_θ(y_t | y_<t) / Σ m_t

    Args:
      state: training state.
      batch: `tokens`, `segment_ids`, `positions` and `loss_mask`, each `[B, T]`, packed.
      optimizer: from `make_optimizer`; static.

    Returns:
      The next state, and this step's metrics.
    """
    mask = batch["loss_mask"]

    def loss(model: Transformer) -> tuple[Float[Array, ""], Metrics]:
        output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        scored = next_token_log_probs(model, output.hidden, batch["tokens"], 1)
        nll = diagnostics.masked_mean(-scored.logp, mask)
        metrics = {
            "sft/loss": nll,
            "sft/entropy": diagnostics.masked_mean(scored.entropy, mask),
            **diagnostics.load_metrics(
                output.router.load, output.router.confidence, batch["segment_ids"] > 0
            ),
        }
        return nll.value(), metrics

    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.model)
    state, norm = apply_gradients(state, gradients, optimizer)
    return state, metrics | {"gradient/norm": Mean(norm, jnp.ones(()))}
