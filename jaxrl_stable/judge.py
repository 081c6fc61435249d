"""From sampled tokens to rewards, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxrl_stable.data import Problem
from jaxrl_stable.rewards import Verdict
from jaxrl_stable.rollout import Trajectory
from jaxrl_stable.task import Task


class Judged(NamedTuple):
    """Responses of a rollout with their verdicts, one entry a row.

    Attributes:
      responses: text without the stop token.
      verdicts: what the reward said.
      rewards: scores; 0 where the checker failed.
      valid: False where the checker failed: such a response is left out of the baseline.
      lengths: tokens, EOS included.
      finished: the response ended by itself.
    """

    responses: list[str]
    verdicts: list[Verdict]
    rewards: Float[np.ndarray, "B"]
    valid: Bool[np.ndarray, "B"]
    lengths: Float[np.ndarray, "B"]
    finished: Bool[np.ndarray, "B"]


def judge(task: Task, problems: Sequence[Problem], trajectory: Trajectory) -> Judged:
    """Decodes and scores the first `len(problems)` rows; further rows are padding."""
    rows = len(problems)
    tokens, mask, finished = jax.device_get(
        (trajectory.tokens, trajectory.response_mask, trajectory.finished)
    )
    responses = task.decode(tokens[:rows], mask[:rows])
    verdicts = task.reward(problems, responses)
    return Judged(
        responses,
        verdicts,
        np.array([v.score for v in verdicts], np.float32),
        np.array([not v.failed for v in verdicts]),
        mask[:rows].sum(-1).astype(np.float32),
        finished[:rows],
    )


def informative(judged: Judged, group_size: int) -> Bool[np.ndarray, "groups"]:
    """Groups in which the known scores are not all equal.

    The others give no gradient, as long as their group is the baseline and nothing but the score is
    rewarded.
    """
    scores, valid = (x.reshape(-1, group_size) for x in (judged.rewards, judged.valid))
    highest = np.where(valid, scores, -np.inf).max(-1)
    return highest > np.where(valid, scores, np.inf).min(-1)


def failed_share(rounds: Sequence[Judged]) -> float:
    """Share of the responses of all rounds whose checker timed out or broke."""
    return float(1.0 - np.concatenate([judged.valid for judged in rounds]).mean())


def reward_metrics(judged: Judged, group_size: int) -> dict[str, float]:
    """What the host knows of a rollout batch.

    - `reward/mean`: mean score of the responses whose checker did not fail
    - `reward/accuracy`: share of them with score 1 or more
    - `reward/failed_share`: share of responses whose checker timed out or broke
    - `reward/zero_variance_share`: share of groups whose scores are all equal
    - `response/length`: mean tokens, EOS included; `response/tokens`: their sum
    - `response/truncated_share`: share of responses that did not end by themselves
    """
    known = judged.rewards[judged.valid]
    return {
        "reward/mean": float(known.mean()) if known.size else 0.0,
        "reward/accuracy": float((known >= 1.0).mean()) if known.size else 0.0,
        "reward/failed_share": failed_share([judged]),
        "reward/zero_variance_share": float(1.0 - informative(judged, group_size).mean()),
        "response/length": float(judged.lengths.mean()),
        "response/tokens": float(judged.lengths.sum()),
        "response/truncated_share": float(1.0 - judged.finished.mean()),
    }
