"""The policy network: configuration, forward pass, cache and output head."""

from jaxrl_stable.model.cache import Cache, empty_cache
from jaxrl_stable.model.config import ModelConfig, qwen3_30b_a3b, qwen3_235b_a22b, tiny
from jaxrl_stable.model.experts import RouterOutput
from jaxrl_stable.model.head import HeadOutput, token_log_probs
from jaxrl_stable.model.transformer import ModelOutput, Transformer, init_model, parameter_count

__all__ = [
    "Cache",
    "HeadOutput",
    "ModelConfig",
    "ModelOutput",
    "RouterOutput",
    "Transformer",
    "empty_cache",
    "init_model",
    "parameter_count",
    "qwen3_30b_a3b",
    "qwen3_235b_a22b",
    "tiny",
    "token_log_probs",
]
