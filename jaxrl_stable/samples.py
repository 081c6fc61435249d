"""Rows of samples.jsonl: responses with what happened to each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxrl_stable.data import Problem, Tokenizer
from jaxrl_stable.judge import Judged
from jaxrl_stable.update import Scored, TrainBatch


def sample_rows(
    problems: Sequence[Problem],
    judged: Judged,
    advantages: Float[Array, "B"],
    batch: TrainBatch,
    scored: Scored | None,
    tokenizer: Tokenizer,
    count: int = 4,
) -> list[dict[str, Any]]:
    """The first `count` responses.

    Per token: its text; `log_weight`, log π_old − log μ_old (nats), the mismatch part of its
    importance weight; `differs`, the number of MoE layers in which the training router would have
    chosen other experts for the token before it, whose output it was drawn from. The last two need
    a `score` pass.
    """
    tokens, mask, rollout, advantages = jax.device_get(
        jax.tree.map(
            lambda x: x[:count],
            (batch.tokens, batch.response_mask, batch.logp_rollout, advantages),
        )
    )
    rows = []
    for i in range(len(tokens)):
        rows.append(
            {
                **problems[i],
                "response": judged.responses[i],
                "score": judged.verdicts[i].score,
                "status": judged.verdicts[i].status,
                "advantage": float(advantages[i]),
                "tokens": [tokenizer.decode([int(t)]) for t in tokens[i][mask[i]]],
            }
        )
    if scored is not None:
        old, differs = jax.device_get((scored.logp_old[:count], scored.differing_layers[:count]))
        for i, row in enumerate(rows):
            row["log_weight"] = (old[i] - rollout[i])[mask[i]].tolist()
            # The experts that shaped token t are those of the token before it.
            row["differs"] = differs[i][:-1][mask[i][1:]].tolist()
    return rows
