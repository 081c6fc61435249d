"""Held-out accuracy: avg@k and pass@k of a policy, with intervals.

python -m jaxrl_stable.evaluate --gin_file=… --workdir=runs/quickstart [--checkpoint=best]
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, Key

from jaxrl_stable import distributed, program
from jaxrl_stable.checkpoint import load_model
from jaxrl_stable.configs import Evaluation, Experiment
from jaxrl_stable.data import encode_prompts
from jaxrl_stable.judge import judge
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.quantize import sampling_copy
from jaxrl_stable.rollout import Trajectory, rollout
from jaxrl_stable.sharding import abstract_state, make_mesh, row_parts, shard_rows
from jaxrl_stable.statistics import avg_at_k, pass_at_k
from jaxrl_stable.task import Task, load_task

CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "latest", ["latest", "best"], "which checkpoint of --workdir to evaluate"
)

Sampler = Callable[..., Trajectory]


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of an evaluation.

    Attributes:
      scores: reward of each sample; NaN where the checker failed.
      lengths: tokens of each response, EOS included.
      finished: the response ended by itself.
    """

    scores: Float[np.ndarray, "problems k"]
    lengths: Float[np.ndarray, "problems k"]
    finished: Bool[np.ndarray, "problems k"]

    @property
    def correct(self) -> Bool[np.ndarray, "problems k"]:
        return np.nan_to_num(self.scores, nan=0.0) >= 1.0

    def metrics(self) -> dict[str, float]:
        """`eval/…` figures: accuracy is the share of samples with score 1 or more.

        A sample whose checker failed counts as wrong, and is reported in `eval/failed_share`.
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


def evaluation_key(seed: int) -> Key[jax.Array, ""]:
    """The key of every evaluation of an experiment."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def make_sampler(task: Task, evaluation: Evaluation, max_tokens: int) -> Sampler:
    """The rollout with the evaluation's sampling, compiled once for the run."""
    sampling = task.sampling(max_tokens, evaluation.temperature, top_p=evaluation.top_p)
    return jax.jit(partial(rollout, sampling=sampling))


def evaluate(
    model: Transformer,
    task: Task,
    experiment: Experiment,
    sampler: Sampler,
    key: Key[jax.Array, ""],
) -> Result:
    """Samples k responses to each held-out problem, with the policy's own weights.

    The same key gives the same random numbers at every evaluation, so that two states of a policy
    are compared on equal terms.
    """
    evaluation, data = experiment.evaluation, experiment.data
    count, k, size = evaluation.problems, evaluation.samples, evaluation.batch_size
    problems = [task.heldout[i] for i in range(count)]
    tokens, mask = encode_prompts(problems, task.tokenizer, data.prompt_width, task.template)
    tokens, mask = np.repeat(tokens, k, axis=0), np.repeat(mask, k, axis=0)
    repeated = [problem for problem in problems for _ in range(k)]
    mesh, model = make_mesh(experiment.mesh), _copy(model)
    shape = size + -size % row_parts(mesh)  # rows that every device gets equally many of

    batches = []
    for start in range(0, len(tokens), size):
        rows = min(size, len(tokens) - start)
        padding = ((0, shape - rows), (0, 0))  # rows without a token sample nothing
        prompts = np.pad(tokens[start : start + rows], padding)
        prompt_mask = np.pad(mask[start : start + rows], padding)
        batch_key = jax.random.fold_in(key, start)
        trajectory = sampler(model, *shard_rows(mesh, (prompts, prompt_mask)), batch_key)
        batches.append(judge(task, repeated[start : start + rows], trajectory))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in batches]).reshape(count, k)

    scores = np.where(joined("valid"), joined("rewards"), np.nan)
    return Result(scores, joined("lengths"), joined("finished"))


def main(experiment: Experiment, workdir: str) -> None:
    """Evaluates a checkpoint of a training run and prints its accuracy."""
    mesh = make_mesh(experiment.mesh)
    template = abstract_state(mesh, lambda: init_model(experiment.model, experiment.seed))
    with jax.set_mesh(mesh), load_task(experiment, workdir) as task:
        model = load_model(
            pathlib.Path(workdir, "checkpoints"),
            experiment.model.architecture(),
            template,
            best=CHECKPOINT.value == "best",
        )
        sampler = make_sampler(task, experiment.evaluation, experiment.reinforcement.max_tokens)
        key = evaluation_key(experiment.seed)
        result = evaluate(model, task, experiment, sampler, key)
    if not distributed.is_main():
        return
    k = result.scores.shape[1]
    figures = {f"avg@{k}": avg_at_k(result.correct)}
    for n in sorted({1, k // 4, k // 2, k} - {0}):
        figures[f"pass@{n}"] = pass_at_k(result.correct, n)
    for name, estimate in figures.items():
        print(
            f"{name}: {estimate.value:.3f}  "
            f"(95% interval {estimate.low:.3f} to {estimate.high:.3f})"
        )
    record = result.metrics() | {name: estimate.value for name, estimate in figures.items()}
    pathlib.Path(workdir, "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    program.run(main)
