"""Rehearsal: all checks that a run makes before its first step, without a trace on disk."""

from __future__ import annotations

import math
import pathlib
import shutil
import tempfile

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxrl_stable import hf
from jaxrl_stable.checkpoint import Checkpointer, has_checkpoints, stored_architecture
from jaxrl_stable.configs import Experiment
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.run.identity import data_of_run, settings_of_run
from jaxrl_stable.run.origin import has_started
from jaxrl_stable.run.task import Task, load_task
from jaxrl_stable.run.wandb_log import check_installed
from jaxrl_stable.sharding import AXES, MeshShape, make_mesh


def rehearse(experiment: Experiment, workdir: str, resumes: bool = False) -> None:
    """Checks an experiment as far as this is possible without running a program of it.

    Data, tokenizer, template, reference answers and reward are loaded and tried. Of the weights to
    start from, names, shapes and types are compared, but the values are not read. Everything that a
    run would write goes to a temporary directory, which is removed.

    Args:
      experiment: the experiment.
      workdir: directory of the run, which need not exist.
      resumes: whether the run would continue from the checkpoints in `workdir`.

    Raises:
      ValueError, FileNotFoundError: if the run would be refused.
    """
    experiment.check_mesh(planned_mesh(experiment.mesh))
    check_installed(experiment.wandb_project)
    if has_started(pathlib.Path(workdir)):  # then `load_task` writes nothing
        resumes = resumes and has_checkpoints(pathlib.Path(workdir, "checkpoints"))
        with load_task(experiment, workdir, cold_start=not resumes) as task:
            if resumes:
                check_checkpoint(experiment, task, workdir)
        return
    check_origin(experiment)
    with tempfile.TemporaryDirectory() as scratch:
        trained = pathlib.Path(workdir) / "tokenizer.model"
        if trained.exists():
            shutil.copy(trained, scratch)
        with load_task(experiment, scratch, cold_start=True):
            pass


def check_checkpoint(experiment: Experiment, task: Task, workdir: str) -> None:
    """Checks that a run could continue from its newest checkpoint.

    Raises:
      ValueError: if the checkpoint is of another model, data set or setting.
    """
    with Checkpointer(
        pathlib.Path(workdir, "checkpoints"),
        experiment.model.architecture(),
        data=data_of_run(experiment, task.identity),
        settings=settings_of_run(experiment, task.heldout, task.reward),
        reading=True,
    ) as checkpoints:
        checkpoints.check()


def planned_mesh(shape: MeshShape) -> Mesh | AbstractMesh:
    """Returns the mesh of a run: real if it fits the devices of this machine, else abstract.

    A run is often rehearsed on another machine. The abstract mesh has one replica (`data`) if their
    number is left to the run, so that what does not divide there divides on no machine.
    """
    sizes = [getattr(shape, name) for name in AXES]
    rest = math.prod(sizes[1:])
    replicas = jax.device_count() // rest if sizes[0] == -1 else sizes[0]
    if replicas * rest == jax.device_count():
        return make_mesh(shape)
    return AbstractMesh((max(1, sizes[0]), *sizes[1:]), AXES)


def check_origin(experiment: Experiment) -> None:
    """Checks that `init_from` holds weights of this model; reads no values.

    Raises:
      ValueError, FileNotFoundError: if not.
    """
    if not experiment.init_from:
        return
    origin, model = pathlib.Path(experiment.init_from), experiment.model
    if not origin.is_dir():
        raise FileNotFoundError(
            f"Experiment.init_from is {experiment.init_from!r}, which is no directory; name the "
            "working directory of a run or a Hugging Face checkpoint"
        )
    if (origin / "config.json").exists():
        hf.check(origin, model)
        return
    stored = ModelConfig.from_architecture(stored_architecture(origin / "checkpoints"))
    here, there = model.architecture(), stored.architecture()
    differing = [f"{name} is {there[name]!r} there and {here[name]!r} here" for name in here]
    differing = [text for text, name in zip(differing, here) if here[name] != there[name]]
    if differing:
        raise ValueError(
            f"Experiment.init_from {experiment.init_from} holds a different model: "
            f"{'; '.join(differing)}; use its configuration"
        )
