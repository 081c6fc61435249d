"""Turns sampled tokens into rewards, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_stable import distributed
from jaxrl_stable.configs import Reinforcement
from jaxrl_stable.data import Problem, unknown_tokens
from jaxrl_stable.rewards import Verdict, overlong_penalty
from jaxrl_stable.rewards.verdict import Status
from jaxrl_stable.run.task import Task
from jaxrl_stable.sharding import row_sharding
from jaxrl_stable.trajectory import Trajectory

STATUSES: tuple[Status, ...] = get_args(Status)


class Judged(NamedTuple):
    """Verdicts and lengths of a rollout's responses, on the host; identical in every process.

    Attributes:
      rewards: scores; 0 if the checker failed.
      status: outcome of the check, as an index into `STATUSES`.
      lengths: response lengths in tokens, EOS included.
      finished: whether the response ended with a stop token.
      unknown: number of response tokens whose id the tokenizer lacks; None counts as 0.
    """

    rewards: Float[np.ndarray, "B"]
    status: Int[np.ndarray, "B"]
    lengths: Int[np.ndarray, "B"]
    finished: Bool[np.ndarray, "B"]
    unknown: Int[np.ndarray, "B"] | None = None

    @property
    def valid(self) -> Bool[np.ndarray, "B"]:
        """False if the checker failed; such a response is left out of the baseline."""
        return ~np.array([Verdict(0.0, status).failed for status in STATUSES])[self.status]


def judge(task: Task, problems: Sequence[Problem | None], trajectory: Trajectory) -> Judged:
    """Decodes and scores the first `len(problems)` rows; the other rows are padding.

    Each process scores the rows that it owns (`distributed.row_owners`), then all processes
    exchange their verdicts.

    Args:
      task: tokenizer and reward.
      problems: one per row; None is allowed for rows of other processes.
      trajectory: the responses.
    """
    rows = len(problems)
    owners = np.zeros(rows, int)
    arrays = trajectory.tokens, trajectory.response_mask, trajectory.finished
    if distributed.several():
        sharding = row_sharding(trajectory.tokens.sharding.mesh)
        arrays = jax.device_put(arrays, sharding)  # whole rows, spread over the processes
        owners = distributed.row_owners(sharding, trajectory.tokens.shape[0])[:rows]
    tokens, mask, finished = (distributed.on_host(x)[:rows] for x in arrays)
    own = np.flatnonzero(owners == jax.process_index())
    responses = task.decode(tokens[own], mask[own])
    verdicts = task.reward([problems[i] for i in own], responses)
    rewards, status = np.zeros(rows, np.float32), np.zeros(rows, np.int8)
    rewards[own] = [verdict.score for verdict in verdicts]
    status[own] = [STATUSES.index(verdict.status) for verdict in verdicts]
    lengths = mask.sum(-1, dtype=np.int32)
    unknown = (mask & unknown_tokens(task.tokenizer, tokens)).sum(-1, dtype=np.int32)
    return distributed.gather_rows(Judged(rewards, status, lengths, finished, unknown), owners)


def scores_differ(judged: Judged, group_size: int) -> Bool[np.ndarray, "groups"]:
    """Returns a mask of the groups whose valid scores are not all equal."""
    scores, valid = (x.reshape(-1, group_size) for x in (judged.rewards, judged.valid))
    highest = np.where(valid, scores, -np.inf).max(-1)
    return highest > np.where(valid, scores, np.inf).min(-1)


def failed_share(rounds: Sequence[Judged]) -> float:
    """Returns the share of responses, over all rounds, whose checker timed out or failed."""
    return float(1.0 - np.concatenate([judged.valid for judged in rounds]).mean())


def reward_metrics(
    judged: Judged, group_size: int, right_at: int | float = 1.0
) -> dict[str, float]:
    """Returns the host-side metrics of a rollout batch.

    - `reward/mean`: mean score of the responses whose checker did not fail; absent if all failed
    - `reward/accuracy`: share of these responses with a score of at least `right_at`; absent if all
      failed
    - `reward/invalid_share`: share of responses without an answer that the reward can read
    - `reward/failed_share`: share of responses whose checker timed out or failed
    - `reward/zero_variance_share`: share of groups whose scores are all equal
    - `response/length`: mean length in tokens, EOS included; `response/tokens`: their sum
    - `response/truncated_share`: share of responses without a stop token
    - `response/unknown_share`: share of response tokens whose id the tokenizer lacks; the reward
      sees U+FFFD for each (see `data.Tokenizer`)
    """
    known = judged.rewards[judged.valid]
    unknown = 0.0 if judged.unknown is None else float(judged.unknown.sum())
    scores = {}
    if known.size:
        scores["reward/mean"] = float(known.mean())
        scores["reward/accuracy"] = float((known >= right_at).mean())
    return scores | {
        "reward/invalid_share": float((judged.status == STATUSES.index("invalid")).mean()),
        "reward/failed_share": failed_share([judged]),
        "reward/zero_variance_share": float(1.0 - scores_differ(judged, group_size).mean()),
        "response/length": float(judged.lengths.mean()),
        "response/tokens": float(judged.lengths.sum()),
        "response/truncated_share": float(1.0 - judged.finished.mean()),
        "response/unknown_share": unknown / max(float(judged.lengths.sum()), 1.0),
    }


def advantage_inputs(rl: Reinforcement, judged: Judged) -> tuple[np.ndarray, ...]:
    """Builds the arguments of `Programs.advantages` and `Programs.informative`.

    Returns:
      A mask of the rows that keep their advantage, then scores, DAPO's length penalty, group ids,
      validity and lengths, each `[B]`.
    """
    kept = judged.finished if rl.overlong_filter else np.ones_like(judged.finished)
    buffer = round(rl.overlong_buffer * rl.max_tokens)
    penalty = overlong_penalty(judged.lengths, rl.max_tokens, buffer)
    groups = np.repeat(np.arange(rl.prompts), rl.group_size)
    return kept, judged.rewards, penalty, groups, judged.valid, judged.lengths
