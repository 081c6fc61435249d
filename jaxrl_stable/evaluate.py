"""Held-out reward and accuracy of a checkpoint: avg@k and pass@k, with intervals.

python -m jaxrl_stable.evaluate --gin_file=… --workdir=runs/quickstart [--checkpoint=best]
"""

from __future__ import annotations

import json
import pathlib

import jax
from absl import flags

from jaxrl_stable import _moved, distributed, program
from jaxrl_stable.checkpoint import load_model, stored_architecture
from jaxrl_stable.configs import Experiment
from jaxrl_stable.model.transformer import init_model
from jaxrl_stable.run.evaluation import evaluate, evaluation_key, make_sampler
from jaxrl_stable.run.rehearsal import rehearse
from jaxrl_stable.run.task import load_task
from jaxrl_stable.sharding import abstract_state, make_mesh

CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "latest", ["latest", "best"], "which checkpoint of --workdir to evaluate"
)


def check(experiment: Experiment, workdir: str) -> None:
    """Checks, in a dry run, what `main` would refuse before it samples."""
    stored_architecture(pathlib.Path(workdir, "checkpoints"))
    rehearse(experiment, workdir)


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
        result = evaluate(model, task, experiment, mesh, sampler, key)
    if not distributed.is_main():
        return
    k = result.scores.shape[1]
    figures = result.estimates(sorted({1, k // 4, k // 2, k} - {0}))
    for name, estimate in figures.items():
        print(
            f"{name}: {estimate.value:.3f}  "
            f"(95% interval {estimate.low:.3f} to {estimate.high:.3f})"
        )
    if result.failed_share:
        print(f"failed: {result.failed_share:.1%} of the samples, left out of these figures")
    record = result.metrics() | {name: estimate.value for name, estimate in figures.items()}
    pathlib.Path(workdir, "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    limit = experiment.reinforcement.max_failed_rewards
    if result.failed_share > limit:
        reasons = "; ".join(task.reward.failures())
        raise RuntimeError(
            f"the reward failed on {result.failed_share:.0%} of the samples, above {limit:.0%} "
            f"(Reinforcement.max_failed_rewards): {reasons}. Fix the reward and evaluate again"
        )


__getattr__ = _moved.moved_names("jaxrl_stable.evaluate")  # names that have moved


if __name__ == "__main__":
    program.run(main, program.EXPERIMENT._replace(check=check))
