"""Stable reinforcement learning of Mixture-of-Experts language models in JAX.

The public names, flat. They load on first use, so that `jaxrl_stable.objectives` needs jax and
numpy alone and a reward worker starts without jax. What is named like its module stays there:
`jaxrl_stable.rollout.rollout`, `jaxrl_stable.update.update`, `jaxrl_stable.quantize.quantize`.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "objectives": ("TokenLoss", "aggregate", "divide", "minirl"),
    "advantages": ("centered", "leave_one_out", "standardized"),
    "corrections": ("correct",),
    "objective": ("Objective",),
    "published": ("PUBLISHED",),
    "routing": ("Routing",),
    "model": ("ModelConfig", "ModelOutput", "Transformer", "init_model", "token_log_probs"),
    "rollout": ("Sampling", "Trajectory"),
    "optimizer": ("TrainState", "init_state", "make_optimizer"),
    "batch": ("TrainBatch", "make_batch", "split"),
    "update": ("score", "with_old_policy"),
    "configs": ("Experiment", "Optimizer", "Reinforcement", "Supervised"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
