"""Key/value cache for decoding: fixed shape, one write column for all rows.

Prompts are left-padded, so all rows append at the same column and a write is one
`dynamic_update_slice`. Only `segment_ids` marks which columns are valid (0 is padding), never the
values.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_stable.model.config import ModelConfig


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, dense layers included.

    Latent attention stores less: `keys` holds the one rotated key that all heads share, and
    `values` the latent from which the rest is computed.

    Attributes:
      keys, values: columns written so far; columns from `length` on are zero.
      segment_ids: segment of each column; 0 for padding and for columns not yet written.
      length: number of columns written.
    """

    keys: Float[Array, "layers B S G kd"]
    values: Float[Array, "layers B S G vd"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]

    def extend(self, segment_ids: Int[Array, "B T"]) -> Cache:
        """Marks T new columns, which each layer then fills with `write`; `length` is unchanged."""
        marks = jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.length))
        return dataclasses.replace(self, segment_ids=marks)

    def write(
        self,
        layer: Int[Array, ""] | int,
        keys: Float[Array, "B T G kd"],
        values: Float[Array, "B T G vd"],
    ) -> Cache:
        """Writes the T new columns of one layer."""
        start = (layer, 0, self.length, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys[None], start),
            values=jax.lax.dynamic_update_slice(self.values, values[None], start),
        )

    def advance(self, columns: int) -> Cache:
        """Advances the write column after all layers have written."""
        return dataclasses.replace(self, length=self.length + columns)

    def widen(self, columns: int) -> Cache:
        """Returns a cache with the same content and room for `columns` columns in total."""
        more = columns - self.segment_ids.shape[1]
        room = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
        return dataclasses.replace(
            self,
            keys=jnp.pad(self.keys, room),
            values=jnp.pad(self.values, room),
            segment_ids=jnp.pad(self.segment_ids, ((0, 0), (0, more))),
        )


def empty_cache(config: ModelConfig, batch: int, columns: int) -> Cache:
    """Creates an empty cache with room for `columns` columns."""
    heads, key_dim, value_dim = config.num_kv_heads, config.head_dim, config.head_dim
    if config.latent:
        heads, key_dim, value_dim = 1, config.latent.rotary_dim, config.latent.key_value_rank
    shape = (config.num_layers, batch, columns, heads)
    return Cache(
        keys=jnp.zeros((*shape, key_dim), config.dtype),
        values=jnp.zeros((*shape, value_dim), config.dtype),
        segment_ids=jnp.zeros((batch, columns), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
