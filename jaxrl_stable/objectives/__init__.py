"""Objectives: arrays in, per-token loss out. They know no model, tokenizer or config object."""

from jaxrl_stable.objectives.aggregation import MODES, aggregate
from jaxrl_stable.objectives.minirl import TokenLoss, minirl

__all__ = ["MODES", "TokenLoss", "aggregate", "minirl"]
