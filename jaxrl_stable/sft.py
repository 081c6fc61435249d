"""Cold start alone: supervised training on prompt-answer pairs, packed.

It starts from the weights of `Experiment.init_from`, or from random ones.

python -m jaxrl_stable.sft --gin_file=… --workdir=runs/cold_start
"""

from jaxrl_stable import _moved, program
from jaxrl_stable.configs import Experiment
from jaxrl_stable.run.cold_start import cold_start_of, run_cold_start
from jaxrl_stable.run.lock import locked
from jaxrl_stable.run.rehearsal import rehearse
from jaxrl_stable.run.task import load_task
from jaxrl_stable.run.wandb_log import check_installed
from jaxrl_stable.sharding import make_mesh


def check(experiment: Experiment, workdir: str) -> None:
    """Checks, in a dry run, what `main` would refuse before its first step."""
    cold_start_of(experiment)
    rehearse(experiment, workdir)


def main(experiment: Experiment, workdir: str) -> None:
    """Trains the model of an experiment on its cold start."""
    mesh = make_mesh(experiment.mesh)
    experiment.check_mesh(mesh)
    check_installed(experiment.wandb_project)
    with locked(workdir), load_task(experiment, workdir, cold_start=True) as task:
        run_cold_start(experiment, task, mesh, workdir)


__getattr__ = _moved.moved_names("jaxrl_stable.sft")  # names that have moved


if __name__ == "__main__":
    program.run(main, program.EXPERIMENT._replace(check=check))
