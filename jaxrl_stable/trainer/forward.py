"""Forward pass of the training program: log-probabilities of response tokens under π."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_stable.model.experts import RouterOutput
from jaxrl_stable.model.head import HeadOutput, next_token_log_probs
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.routing import Routing, overlap
from jaxrl_stable.trainer.batch import TrainBatch
from jaxrl_stable.trainer.packing import PackedRows
from jaxrl_stable.trajectory import Trajectory


def policy_log_probs(
    model: Transformer,
    batch: TrainBatch | PackedRows,
    replay: Routing | None,
    temperature: float,
) -> tuple[HeadOutput, RouterOutput]:
    """Scores the response tokens (see `response_log_probs`); also returns the router output."""
    hidden, router = hidden_states(model, batch, replay)
    return response_log_probs(model, hidden, batch, temperature), router


def hidden_states(
    model: Transformer, batch: TrainBatch | Trajectory | PackedRows, replay: Routing | None
) -> tuple[Float[Array, "B T D"], RouterOutput]:
    """Runs the training program's forward pass over whole rows."""
    if isinstance(batch, PackedRows):
        places = batch.positions, batch.segment_ids
    else:
        positions = jnp.maximum(jnp.cumsum(batch.real, axis=-1) - 1, 0)
        places = positions, batch.real.astype(jnp.int32)
    output = model(batch.tokens, *places, replay=replay)
    return output.hidden, output.router


def response_log_probs(
    model: Transformer,
    hidden: Float[Array, "B T D"],
    batch: TrainBatch | Trajectory | PackedRows,
    temperature: float,
) -> HeadOutput:
    """Scores the response tokens; the result is 0 outside the mask.

    Column t of the result scores `tokens[:, t]`, which the hidden state of column t − 1 predicts.
    """
    scored = next_token_log_probs(model, hidden, batch.tokens, batch.prompt_width, temperature)
    return jax.tree.map(lambda x: jnp.where(batch.response_mask, x, 0.0), scored)


def agreement(batch: TrainBatch | PackedRows, router: RouterOutput) -> Float[Array, "L B T"]:
    """Returns the share of each token's K recorded experts that the training router also picks."""
    return overlap(batch.routing.experts, router.live)
