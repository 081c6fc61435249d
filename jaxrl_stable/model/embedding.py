"""Embedding lookup on a mesh: ids are sent to the shards of the table, and rows are sent back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_stable.sharding import mesh_axes, spec
from jaxrl_stable.sharding.layout import Layout


@jax.named_scope("embed")
def lookup(
    table: nnx.Param, tokens: Int[Array, "B T"], dtype: str, layout: Layout
) -> Float[Array, "B T D"]:
    """Returns row `tokens[b, t]` of the table, in the compute dtype.

    Each device stores some columns of the table (and with `tensor`, only some rows). It looks up
    its part for the tokens of all devices among which the columns are split. An all-to-all then
    gives each device the whole rows for its own tokens. Only D numbers per token are sent, never
    the table, and the gradient is summed in float32 on the device that stores the row.

    Args:
      table: embedding with axes ("vocab", "embed").
      tokens: token ids.
      dtype: dtype of the result.
      layout: placement of the rows and columns of `tokens` on the mesh.
    """
    value = table.get_value()
    if not layout.shape:
        return value.astype(jnp.float32)[tokens].astype(dtype)
    partition = spec(table.get_metadata()["axes"], value.shape, jax.sharding.get_abstract_mesh())
    tensor, stored = map(mesh_axes, partition)

    def local(
        table: Float[Array, "v d"], tokens: Int[Array, "b t"]
    ) -> Float[Array, "b t D"]:  # sizes on one device
        ids = tokens.reshape(-1)
        if stored:
            ids = jax.lax.all_gather(ids, stored, tiled=True)
        if tensor:
            ids = ids - jax.lax.axis_index(tensor) * table.shape[0]
            ids = jnp.where((ids >= 0) & (ids < table.shape[0]), ids, table.shape[0])
        rows = table.astype(jnp.float32).at[ids].get(mode="fill", fill_value=0).astype(dtype)
        if tensor:
            rows = jax.lax.psum(rows, tensor)
        if stored:
            rows = jax.lax.all_to_all(rows, stored, split_axis=0, concat_axis=1, tiled=True)
        return rows.reshape(*tokens.shape, -1)

    specs = dict(in_specs=(partition, layout.spec()), out_specs=layout.spec(None))
    return jax.shard_map(local, **specs)(value, tokens)
