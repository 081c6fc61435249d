"""FLOPs that the model needs, regardless of the program: the numerator of model FLOPs utilisation.

The definition is MaxText's (docs/reference/performance_metrics.md). A multiplication with an
addition counts 2, a backward pass counts twice its forward pass, causal attention counts half of
all pairs, and recomputation does not count. Embedding look-ups, norms and the optimizer are left
out.
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
      config: configuration of the model.
      rows: number of sequences.
      columns: tokens per sequence.
      scored: tokens per sequence whose logits are computed.
      past: tokens before the first column, held by a cache.
    """
    body, head = matrix_sizes(config)
    value_dim = config.latent.value_dim if config.latent else config.head_dim
    pairs = columns * past + columns**2 / 2
    attention = config.num_layers * config.num_heads * (config.head_dim + value_dim) * pairs
    return 2.0 * rows * (columns * body + scored * head + attention)


def matrix_sizes(config: ModelConfig) -> tuple[float, float]:
    """Returns how many weights multiply one token, in the blocks and in the output head."""
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
