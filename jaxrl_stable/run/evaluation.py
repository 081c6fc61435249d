"""Held-out reward and accuracy of a policy: mean reward, avg@k and pass@k, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_stable.configs import Evaluation, Experiment
from jaxrl_stable.data import encode_prompts
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.run.judge import STATUSES, judge
from jaxrl_stable.run.task import Task
from jaxrl_stable.sampler.quantize import sampling_copy
from jaxrl_stable.sampler.rollout import rollout
from jaxrl_stable.sharding import row_parts, shard_rows
from jaxrl_stable.statistics import Estimate, avg_at_k, pass_at_k
from jaxrl_stable.trajectory import Trajectory

Sampler = Callable[..., Trajectory]


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of an evaluation.

    Attributes:
      scores: reward of each sample; NaN if the checker failed.
      lengths: tokens of each response, EOS included.
      finished: whether the response ended with a stop token.
      invalid: whether the response has no answer that the reward can read.
      right_at: lowest score of a correct response, see `rewards.Reward`.
    """

    scores: Float[np.ndarray, "problems k"]
    lengths: Int[np.ndarray, "problems k"]
    finished: Bool[np.ndarray, "problems k"]
    invalid: Bool[np.ndarray, "problems k"]
    right_at: int | float = 1.0

    @property
    def correct(self) -> Float[np.ndarray, "problems k"]:
        """1 for a correct response, 0 for a wrong one, NaN if the checker failed."""
        return np.where(np.isnan(self.scores), np.nan, self.scores >= self.right_at)

    @property
    def failed_share(self) -> float:
        """Share of the samples whose checker failed."""
        return float(np.isnan(self.scores).mean())

    def estimates(self, ks: Sequence[int]) -> dict[str, Estimate]:
        """Returns the mean reward, avg@k, and pass@n for each n of `ks`, with intervals.

        Samples whose checker failed are left out. A figure is absent if it cannot be estimated: if
        all samples failed or, for pass@n, if no problem has n judged samples.
        """
        known, k = (~np.isnan(self.scores)).sum(1), self.scores.shape[1]
        figures = {}
        if known.any():
            figures["reward"] = avg_at_k(self.scores)
            figures[f"avg@{k}"] = avg_at_k(self.correct)
        for n in ks:
            if (known >= n).any():
                figures[f"pass@{n}"] = pass_at_k(self.correct, n)
        return figures

    def metrics(self) -> dict[str, float]:
        """Returns the `eval/…` metrics; see `estimates` for failed checkers."""
        count, k = self.scores.shape
        values = {}
        names = {
            "reward": "eval/reward",
            f"avg@{k}": "eval/avg_at_k",
            f"pass@{k}": "eval/pass_at_k",
        }
        for figure, estimate in self.estimates([k]).items():
            name = names[figure]
            values[name] = estimate.value
            values[f"{name}_low"] = estimate.low
            values[f"{name}_high"] = estimate.high
        return values | {
            "eval/k": float(k),
            "eval/problems": float(count),
            "eval/length": float(self.lengths.mean()),
            "eval/truncated_share": float(1.0 - self.finished.mean()),
            "eval/invalid_share": float(self.invalid.mean()),
            "eval/failed_share": self.failed_share,
        }

    def score(self, ranking: str, max_failed: float) -> float | None:
        """Returns the score that ranks checkpoints.

        Args:
          ranking: `Evaluation.best`.
          max_failed: largest allowed share of failed checkers.

        Returns:
          The value of the metric, or None if too many checkers failed or the metric is absent.
        """
        if self.failed_share > max_failed:
            return None
        return self.metrics().get(f"eval/{ranking}")


_copy = jax.jit(partial(sampling_copy, format="none"))


def evaluation_key(seed: int) -> Key[Array, ""]:
    """Returns the key that every evaluation of an experiment uses."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def make_sampler(task: Task, evaluation: Evaluation, max_tokens: int) -> Sampler:
    """Returns the jitted rollout with the evaluation's sampling; it compiles once per run.

    Args:
      task: the task, which defines the stop tokens.
      evaluation: sampling settings.
      max_tokens: longest response if the evaluation has no limit of its own.
    """
    limit = evaluation.max_tokens or max_tokens
    sampling = task.sampling(limit, evaluation.temperature, evaluation.top_k, evaluation.top_p)
    return jax.jit(partial(rollout, sampling=sampling))


def evaluate(
    model: Transformer,
    task: Task,
    experiment: Experiment,
    mesh: Mesh,
    sampler: Sampler,
    key: Key[Array, ""],
) -> Result:
    """Samples k responses to each held-out problem, with the policy's own weights.

    Args:
      model: the policy.
      task: held-out problems, tokenizer and reward.
      experiment: see `Experiment.evaluation`.
      mesh: device mesh of the run.
      sampler: from `make_sampler`.
      key: PRNG key. With the same key, every evaluation uses the same random numbers, so that two
        states of a policy are compared on equal terms.
    """
    evaluation, data = experiment.evaluation, experiment.data
    count, k, size = evaluation.problems, evaluation.samples, evaluation.batch_size
    problems = [task.heldout[i] for i in range(count)]
    tokens, mask = encode_prompts(problems, task.tokenizer, data.prompt_width, task.template)
    tokens, mask = np.repeat(tokens, k, axis=0), np.repeat(mask, k, axis=0)
    repeated = [problem for problem in problems for _ in range(k)]
    model = _copy(model)
    shape = size + -size % row_parts(mesh)  # the same number of rows on every device

    batches = []
    for start in range(0, len(tokens), size):
        rows = min(size, len(tokens) - start)
        padding = ((0, shape - rows), (0, 0))  # nothing is sampled for rows without tokens
        prompts = np.pad(tokens[start : start + rows], padding)
        prompt_mask = np.pad(mask[start : start + rows], padding)
        batch_key = jax.random.fold_in(key, start)
        trajectory = sampler(model, *shard_rows(mesh, (prompts, prompt_mask)), batch_key)
        batches.append(judge(task, repeated[start : start + rows], trajectory))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in batches]).reshape(count, k)

    scores = np.where(joined("valid"), joined("rewards"), np.nan)
    invalid = joined("status") == STATUSES.index("invalid")
    return Result(scores, joined("lengths"), joined("finished"), invalid, task.reward.right_at)
