"""Held-out accuracy: avg@k and pass@k of a policy, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_stable.configs import Evaluation, Experiment
from jaxrl_stable.data import encode_prompts
from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.run.judge import judge
from jaxrl_stable.run.task import Task
from jaxrl_stable.sampler.quantize import sampling_copy
from jaxrl_stable.sampler.rollout import rollout
from jaxrl_stable.sharding import row_parts, shard_rows
from jaxrl_stable.statistics import avg_at_k, pass_at_k
from jaxrl_stable.trajectory import Trajectory

Sampler = Callable[..., Trajectory]


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of an evaluation.

    Attributes:
      scores: reward of each sample; NaN if the checker failed.
      lengths: tokens of each response, EOS included.
      finished: whether the response ended with a stop token.
    """

    scores: Float[np.ndarray, "problems k"]
    lengths: Int[np.ndarray, "problems k"]
    finished: Bool[np.ndarray, "problems k"]

    @property
    def correct(self) -> Bool[np.ndarray, "problems k"]:
        return np.nan_to_num(self.scores, nan=0.0) >= 1.0

    def metrics(self) -> dict[str, float]:
        """Returns the `eval/…` metrics; a sample is correct if its score is at least 1.

        A sample whose checker failed counts as wrong and is counted in `eval/failed_share`.
        """
        correct = self.correct
        k = correct.shape[1]
        mean, any_of_k = avg_at_k(correct), pass_at_k(correct, k)
        return {
            "eval/avg_at_k": mean.value,
            "eval/avg_at_k_low": mean.low,
            "eval/avg_at_k_high": mean.high,
            "eval/pass_at_k": any_of_k.value,
            "eval/pass_at_k_low": any_of_k.low,
            "eval/pass_at_k_high": any_of_k.high,
            "eval/k": float(k),
            "eval/problems": float(correct.shape[0]),
            "eval/length": float(self.lengths.mean()),
            "eval/truncated_share": float(1.0 - self.finished.mean()),
            "eval/failed_share": float(np.isnan(self.scores).mean()),
        }


_copy = jax.jit(partial(sampling_copy, format="none"))


def evaluation_key(seed: int) -> Key[Array, ""]:
    """Returns the key that every evaluation of an experiment uses."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def make_sampler(task: Task, evaluation: Evaluation, max_tokens: int) -> Sampler:
    """Returns the jitted rollout with the evaluation's sampling; it compiles once per run."""
    sampling = task.sampling(max_tokens, evaluation.temperature, top_p=evaluation.top_p)
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
      key: the same key gives the same random numbers at every evaluation, so that two states of a
        policy are compared on equal terms.
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
        padding = ((0, shape - rows), (0, 0))  # rows without any token sample nothing
        prompts = np.pad(tokens[start : start + rows], padding)
        prompt_mask = np.pad(mask[start : start + rows], padding)
        batch_key = jax.random.fold_in(key, start)
        trajectory = sampler(model, *shard_rows(mesh, (prompts, prompt_mask)), batch_key)
        batches.append(judge(task, repeated[start : start + rows], trajectory))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in batches]).reshape(count, k)

    scores = np.where(joined("valid"), joined("rewards"), np.nan)
    return Result(scores, joined("lengths"), joined("finished"))
