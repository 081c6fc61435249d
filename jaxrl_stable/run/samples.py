"""Rows of samples.jsonl: responses, with details on each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_stable import distributed
from jaxrl_stable.data import Problem
from jaxrl_stable.run.judge import STATUSES, Judged
from jaxrl_stable.run.task import Task
from jaxrl_stable.trainer.batch import TrainBatch
from jaxrl_stable.trainer.score import Scored

FIELDS = ("prompt", "answer", "messages")


def sample_rows(
    problems: Sequence[Problem],
    chosen: Int[np.ndarray, "rows"],
    judged: Judged,
    advantages: Float[Array, "B"],
    batch: TrainBatch,
    scored: Scored | None,
    task: Task,
) -> list[dict[str, Any]]:
    """Returns rows for chosen responses in a batch. All processes must call this.

    Each row has, per token: its text; `log_weight`, log π_old − log μ_old in nats, the mismatch
    part of its importance weight; and `differs`, the number of MoE layers where the training router
    disagrees with the sampler on the preceding token, from whose output this token was sampled. The
    last two need a `score` pass.

    Args:
      problems: the problem of each chosen response.
      chosen: rows of the batch.
      judged: verdicts of the batch.
      advantages: advantages of the batch.
      batch: tokens of the batch.
      scored: result of the `score` pass, if there was one.
      task: turns tokens into text.
    """
    arrays = [batch.tokens, batch.response_mask, batch.logp_rollout, advantages]
    if scored is not None:
        arrays += [scored.logp_old, scored.differing_layers]
    tokens, mask, rollout, advantages, *of_score = distributed.replicated(
        [x[chosen] for x in arrays]
    )
    rows = []
    for i, response in enumerate(task.decode(tokens, mask)):
        # Only these fields: other columns may be large, or share a name with an entry below.
        given = {name: problems[i][name] for name in FIELDS if name in problems[i]}
        row = given | {
            "response": response,
            "score": float(judged.rewards[chosen[i]]),
            "status": STATUSES[judged.status[chosen[i]]],
            "advantage": float(advantages[i]),
            "tokens": [task.tokenizer.decode([int(t)]) for t in tokens[i][mask[i]]],
        }
        if of_score:
            old, differs = of_score
            row["log_weight"] = (old[i] - rollout[i])[mask[i]].tolist()
            # Token t was predicted from token t − 1, whose experts are in row t − 1.
            row["differs"] = differs[i][:-1][mask[i][1:]].tolist()
        rows.append(row)
    return rows
