"""Reference policy of the KL term: the weights that a run started from, kept with the run.

The weights are stored at the first start. If the KL term is switched on later, they are rebuilt
from their origin and must have the fingerprint that the run recorded.
"""

from __future__ import annotations

import pathlib

from jax.sharding import Mesh

from jaxrl_stable import distributed
from jaxrl_stable.checkpoint import Checkpointer, load_model
from jaxrl_stable.configs import Experiment
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.run.fingerprint import fingerprint
from jaxrl_stable.run.origin import load_origin, read_record, write_record
from jaxrl_stable.sharding import abstract_state


def keep_start(
    experiment: Experiment, policy: Transformer, mesh: Mesh, workdir: pathlib.Path
) -> None:
    """Records the fingerprint of the first policy; stores its weights if there is a KL term."""
    if experiment.reinforcement.objective.kl_coefficient:
        architecture = experiment.model.architecture()
        with Checkpointer(_directory(workdir), architecture, keep=1) as checkpoints:
            # An interrupted start may have left a step; this one is newer, and `keep` deletes it.
            checkpoints.save(max(checkpoints.steps, default=-1) + 1, {"model": policy})
    weights = fingerprint(policy, mesh)
    if distributed.is_main():
        write_record(workdir, weights=weights)


def kept_reference(experiment: Experiment, mesh: Mesh, workdir: pathlib.Path) -> Transformer:
    """Returns the first policy of a run, after `keep_start`.

    A run from an older version has no record; its reference is rebuilt once and then kept.

    Raises:
      ValueError, FileNotFoundError: if the weights were not stored and cannot be rebuilt.
    """
    template = abstract_state(mesh, lambda: init_model(experiment.model, experiment.seed))
    architecture = experiment.model.architecture()
    if _directory(workdir).is_dir():
        return load_model(_directory(workdir), architecture, template)
    cold_start = workdir / "cold_start" / "checkpoints"
    if cold_start.is_dir():
        policy, origin = load_model(cold_start, architecture, template), str(cold_start)
    elif experiment.cold_start is not None and not experiment.init_from:
        raise ValueError(
            f"{cold_start} is missing, and with it the reference policy of the KL term; restore "
            "it, or set Objective.kl_coefficient = 0"
        )
    else:
        origin = f"Experiment.init_from {experiment.init_from}"
        policy = load_origin(experiment, mesh)
    recorded = read_record(workdir).get("weights")
    found = fingerprint(policy, mesh)
    if recorded not in (None, found):
        raise ValueError(
            f"{origin} no longer holds the weights that this run started from (the fingerprint is "
            f"{found}, but was {recorded}), so the KL term has no reference; restore the weights, "
            "or set Objective.kl_coefficient = 0"
        )
    keep_start(experiment, policy, mesh, workdir)
    return policy


def _directory(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "origin" / "reference"
