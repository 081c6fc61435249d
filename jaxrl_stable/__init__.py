"""Stable reinforcement learning of Mixture-of-Experts language models in JAX.

The most important names of all modules are available here. They load on first use, so the losses
need only jax and numpy, and a reward worker starts without jax.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from jaxrl_stable import _moved

if TYPE_CHECKING:
    from jaxrl_stable.advantages import centered, leave_one_out, standardized
    from jaxrl_stable.configs import Experiment, Optimizer, Reinforcement, Supervised
    from jaxrl_stable.corrections import correct
    from jaxrl_stable.gin_files import load_experiment
    from jaxrl_stable.model import (
        ModelConfig,
        ModelOutput,
        Transformer,
        init_model,
        token_log_probs,
    )
    from jaxrl_stable.objective import Objective
    from jaxrl_stable.objectives import TokenLoss, aggregate, divide, minirl
    from jaxrl_stable.published import PUBLISHED
    from jaxrl_stable.routing import Routing
    from jaxrl_stable.sampler.quantize import quantize
    from jaxrl_stable.sampler.rollout import Sampling, rollout
    from jaxrl_stable.trainer.batch import TrainBatch, make_batch, split
    from jaxrl_stable.trainer.optimizer import TrainState, init_state, make_optimizer
    from jaxrl_stable.trainer.score import score, with_old_policy
    from jaxrl_stable.trainer.update import update
    from jaxrl_stable.trajectory import Trajectory

__version__ = "0.1.0"

# The same names by module, for loading on first use.
_MODULES = {
    "advantages": ("centered", "leave_one_out", "standardized"),
    "configs": ("Experiment", "Optimizer", "Reinforcement", "Supervised"),
    "corrections": ("correct",),
    "gin_files": ("load_experiment",),
    "model": ("ModelConfig", "ModelOutput", "Transformer", "init_model", "token_log_probs"),
    "objective": ("Objective",),
    "objectives": ("TokenLoss", "aggregate", "divide", "minirl"),
    "published": ("PUBLISHED",),
    "routing": ("Routing",),
    "sampler.quantize": ("quantize",),
    "sampler.rollout": ("Sampling", "rollout"),
    "trainer.batch": ("TrainBatch", "make_batch", "split"),
    "trainer.optimizer": ("TrainState", "init_state", "make_optimizer"),
    "trainer.score": ("score", "with_old_policy"),
    "trainer.update": ("update",),
    "trajectory": ("Trajectory",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

# All modules except the programs, which define flags.
_SUBMODULES = (
    *("advantages", "aot", "array_tasks", "array_types", "checkpoint", "checks", "configs"),
    *("corrections", "data", "diagnostics", "distributed", "files", "gin_files", "hf"),
    *("importance", "model", "objective", "objectives", "program", "published", "report"),
    *("rewards", "routing", "run", "sampler", "sharding", "statistics", "study", "text"),
    *("trainer", "trajectory"),
)

__all__ = sorted(_HOME)
if "pdoc" in sys.modules:  # it documents only the submodules that `__all__` lists
    __all__ += _SUBMODULES

_moved.install()


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # so the next access does not come here, and pdoc finds the value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
