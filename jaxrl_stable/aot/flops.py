"""FLOPs that the model needs, regardless of the program: the numerator of model FLOPs utilisation.

The definition is MaxText's (docs/reference/performance_metrics.md). A multiply-add counts as 2
FLOPs, a backward pass as twice its forward pass, and causal attention as half of all (query, key)
pairs. Recomputation, embedding look-ups, norms and the optimizer do not count.
"""

from __future__ import annotations

import math

import jax
from flax import nnx

from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.transformer import init_model


def forward_flops(
    config: ModelConfig, rows: int, columns: int, scored: int, past: int = 0
) -> float:
    """Returns the FLOPs of one forward pass over whole rows.

    Args:
      config: model configuration.
      rows: number of sequences.
      columns: tokens per sequence.
      scored: tokens per sequence whose logits are computed.
      past: tokens before the first column, held in a cache.
    """
    body, head = matrix_sizes(config)
    value_dim = config.latent.value_dim if config.latent else config.head_dim
    pairs = columns * past + columns**2 / 2
    attention = config.num_layers * config.num_heads * (config.head_dim + value_dim) * pairs
    return 2.0 * rows * (columns * body + scored * head + attention)


def matrix_sizes(config: ModelConfig) -> tuple[float, float]:
    """Returns the number of weights that multiply each token, in the blocks and in the head."""
    model = jax.eval_shape(lambda: init_model(config, 0))
    params = jax.tree.leaves(model.stacks, is_leaf=lambda x: isinstance(x, nnx.Variable))
    body = 0.0
    for param in params:
        metadata = param.get_metadata()
        if metadata["inputs"] is None:
            continue
        size = math.prod(param.get_value().shape)
        if "expert" in metadata["axes"]:
            size *= config.num_experts_per_token / config.num_experts
        body += size
    return body, float(config.hidden_size * config.vocab_size)
