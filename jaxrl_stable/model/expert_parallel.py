"""Expert parallelism: tokens are sent to the experts and back, inside one `jax.shard_map`.

Two exchanges compute the same result and drop no token:

- "all_gather": each device receives the tokens of all devices in its expert group and applies its
  experts to the tokens that chose them; a reduce-scatter then sums the results. This needs only two
  plain collectives, but each device receives D numbers for every token of its group, regardless of
  the choices.
- "ragged_all_to_all": each token is sent only to the devices that hold its K experts. This needs
  less traffic once a group has more devices than a token has experts, but two sorts instead of one.

Buffers have room for the worst case, in which one device serves every choice. If that exceeds
`ModelConfig.experts_rows`, tokens are processed in several chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer, UInt

from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.dispatch import (
    ExpertWeights,
    apply_experts,
    apply_rows,
    experts_implementation,
    group_by_expert,
    scatter_rows,
    take_rows,
)
from jaxrl_stable.model.parameters import Quantized
from jaxrl_stable.model.products import operand
from jaxrl_stable.routing import expert_dtype
from jaxrl_stable.sharding import STORED, gather_axis, mesh_axes, spec
from jaxrl_stable.sharding.layout import Layout


def mixture(
    params: tuple[nnx.Param, nnx.Param, nnx.Param],
    x: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    chosen: Int[Array, "B T K"],
    gates: Float[Array, "B T K"],
    config: ModelConfig,
    layout: Layout,
) -> Float[Array, "B T D"]:
    """Returns the gate-weighted sum of the chosen experts' outputs; zero for padding tokens.

    Args:
      params: gate, up and down matrices of one layer, as stored.
      x: activations.
      real: False on padding, which is sent to no expert.
      chosen: experts of each token.
      gates: weight of each choice.
      config: model configuration.
      layout: placement of rows and columns on the mesh.
    """
    stored = [param.get_value() for param in params]
    if not layout.shape:
        weights = ExpertWeights(*(operand(w, x.dtype) for w in stored))
        apply = partial(apply_experts, config=config)
        return _in_chunks(apply, weights, x, real, chosen, gates, config, 1)

    mesh = jax.sharding.get_abstract_mesh()
    partitions = [
        jax.tree.map(lambda w, p=p: spec(p.get_metadata()["axes"][-w.ndim :], w.shape, mesh), value)
        for p, value in zip(params, stored)
    ]

    # These kernels need check_vma=False: their output types do not record the mesh axes over which
    # the outputs vary.
    checked = experts_implementation(config) not in ("megablox", "tokamax")
    held = {axis for entry in _of_values(partitions[0]) for axis in mesh_axes(entry)}
    copied = tuple(a for a in layout.rows + layout.columns if a not in held)

    def local(
        stored: list[Array | Quantized],
        x: Float[Array, "b t D"],
        real: Bool[Array, "b t"],
        chosen: UInt[Array, "b t K"],
        gates: Float[Array, "b t K"],
    ) -> Float[Array, "b t D"]:
        if checked and copied:  # so that gradients of the copies are summed in the storage dtype
            stored = jax.lax.pcast(stored, copied, to="varying")
        bring = zip(stored, partitions)
        weights = ExpertWeights(*(_bring(operand(w, x.dtype), p) for w, p in bring))
        experts, _, tensor = map(mesh_axes, _of_values(partitions[0]))
        travel = partial(_travel, config=config, experts=experts, tensor=tensor, layout=layout)
        return _in_chunks(travel, weights, x, real, chosen, gates, config, layout.size(experts))

    chosen = chosen.astype(expert_dtype(config.num_experts))  # sends one byte per choice, not four
    rows = layout.spec()
    each = layout.spec(None)
    return jax.shard_map(
        local,
        in_specs=(partitions, each, rows, each, each),
        out_specs=each,
        check_vma=checked,
    )(stored, x, real, chosen, gates)


def _travel(
    weights: ExpertWeights,
    tokens: Float[Array, "N D"],
    real: Bool[Array, "N"],
    chosen: UInt[Array, "N K"],
    gates: Float[Array, "N K"],
    config: ModelConfig,
    experts: tuple[str, ...],
    tensor: tuple[str, ...],
    layout: Layout,
) -> Float[Array, "N D"]:
    """Sends this device's tokens to their experts and returns the combined outputs.

    Args:
      weights: this device's experts, sharded at most over `tensor`.
      tokens, real, chosen, gates: local inputs, `[N, ...]`; `chosen` has global expert ids.
      config: model configuration.
      experts: mesh axes over which experts (and rows) are sharded.
      tensor: mesh axes over which the expert width is sharded.
      layout: sizes of the mesh axes.
    """
    if tensor:  # all devices along `tensor` have the same tokens; each computes a partial sum
        tokens, gates = jax.lax.pcast((tokens, gates), tensor, to="varying")
    if experts and config.experts_exchange == "ragged_all_to_all":
        y = _exchange(weights, tokens, real, chosen, gates, config, experts, tensor, layout)
        return jax.lax.psum(y, tensor) if tensor else y
    first = 0
    if experts:
        with jax.named_scope("dispatch"):
            first = jax.lax.axis_index(experts) * weights.gate.shape[0]
            together = partial(jax.lax.all_gather, axis_name=experts, axis=0, tiled=True)
            tokens, real, chosen, gates = map(together, (tokens, real, chosen, gates))
    y = apply_experts(
        weights, tokens, real, chosen.astype(jnp.int32) - first, gates, config, tensor
    )
    with jax.named_scope("combine"):
        y = jax.lax.psum(y, tensor) if tensor else y
        if experts:
            y = jax.lax.psum_scatter(y, experts, scatter_dimension=0, tiled=True)
        return y


def _exchange(
    weights: ExpertWeights,
    tokens: Float[Array, "N D"],
    real: Bool[Array, "N"],
    chosen: UInt[Array, "N K"],
    gates: Float[Array, "N K"],
    config: ModelConfig,
    axes: tuple[str, ...],
    tensor: tuple[str, ...],
    layout: Layout,
) -> Float[Array, "N D"]:
    """Like `_travel`, but with `ragged_all_to_all`: sends one copy of a token to each expert."""
    size = layout.size(axes)
    E, here = config.num_experts, weights.gate.shape[0]
    with jax.named_scope("dispatch"):
        # Pairs are sorted by expert, hence by device.
        pairs = group_by_expert(chosen.astype(jnp.int32), real, E)
        counts = jax.lax.all_gather(pairs.sizes, axes).reshape(size, size, here)  # from, to, expert
        received = tokens.shape[0] * size * min(config.num_experts_per_token, here)
        out = _journey(counts.sum(-1), axes)
        back = _journey(counts.sum(-1).T, axes)

        rows = _ragged(scatter_rows(tokens, pairs.source, pairs.slot), received, out, axes)
        # Received rows are sorted by sender, then by expert.
        arrived = counts[:, jax.lax.axis_index(axes)].reshape(-1)
        run = jnp.searchsorted(jnp.cumsum(arrived), jnp.arange(received), side="right")
        expert = jnp.where(run < arrived.size, run % here, here)
    rows = apply_rows(weights, rows, expert, config, tensor)
    with jax.named_scope("combine"):
        rows = _ragged(rows, pairs.source.shape[0], back, axes)
        outputs = take_rows(rows, pairs.source, pairs.slot)
        return jnp.einsum("nkd,nk->nd", outputs, gates)


def _journey(
    counts: Int[Array, "size size"], axes: tuple[str, ...]
) -> tuple[Int[Array, "size"], ...]:
    """Returns this device's offsets and sizes, in the argument order of `ragged_all_to_all`.

    `counts[i, j]` is the number of rows that device i sends to device j.
    """
    me = jax.lax.axis_index(axes)
    sent, received = counts[me], counts[:, me]
    here = jnp.cumsum(sent) - sent
    there = (jnp.cumsum(counts, axis=0) - counts)[me]
    return here, sent, there, received


def _ragged(
    rows: Float[Array, "N D"],
    size: int,
    journey: tuple[Int[Array, "devices"], ...],
    axes: tuple[str, ...],
) -> Float[Array, "{size} D"]:
    """Sends rows to their devices; returns a buffer of `size` rows, zero where none arrived."""
    buffer = jnp.zeros_like(rows, shape=(size, rows.shape[1]))

    def collective(
        rows: Float[Array, "N D"], *journey: Int[Array, "devices"]
    ) -> Float[Array, "R D"]:
        return jax.lax.ragged_all_to_all(rows, buffer, *journey, axis_name=axes)

    def plain(rows: Float[Array, "N D"], *journey: Int[Array, "devices"]) -> Float[Array, "R D"]:
        """Emulates the collective with an all-gather on CPUs, which lack it."""
        here, _, _, received = journey
        every = jax.lax.all_gather(rows, axes)
        # Start of the slice for this device, per sender.
        starts = jax.lax.all_to_all(here, axes, 0, 0, tiled=True)
        ends = jnp.cumsum(received)
        index = jnp.arange(size)
        sender = jnp.searchsorted(ends, index, side="right")
        row = starts[sender] + index - (ends - received)[sender]
        return every.at[sender, row].get(mode="fill", fill_value=0)

    return jax.lax.platform_dependent(rows, *journey, cpu=plain, default=collective)


def _in_chunks(
    function: Callable[..., Float[Array, "n D"]],
    weights: ExpertWeights,
    x: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    chosen: Integer[Array, "B T K"],
    gates: Float[Array, "B T K"],
    config: ModelConfig,
    senders: int,
) -> Float[Array, "B T D"]:
    """Applies `function` to chunks of tokens that fit into the experts' buffer.

    Each chunk keeps only its input for the backward pass; otherwise chunking would save no memory.
    """
    n, k = real.size, chosen.shape[-1]
    most = n * senders * min(k, weights.gate.shape[0])
    chunks = -(-most // config.experts_rows)
    flat = (x.reshape(n, -1), real.reshape(n), chosen.reshape(n, k), gates.reshape(n, k))
    if chunks == 1:
        return function(weights, *flat).reshape(x.shape)
    padding = -n % chunks  # padding tokens, with `real` False
    cut = [jnp.pad(a, ((0, padding), *[(0, 0)] * (a.ndim - 1))) for a in flat]
    cut = [a.reshape(chunks, -1, *a.shape[1:]) for a in cut]
    exact = ExpertWeights(*(operand(w, jnp.float32) for w in weights))  # sums gradients in float32

    @jax.checkpoint
    def one(chunk: list[Array]) -> Float[Array, "n D"]:
        return function(ExpertWeights(*(operand(w, x.dtype) for w in exact)), *chunk)

    return jax.lax.map(one, cut).reshape(n + padding, -1)[:n].reshape(x.shape)


def _bring(w: Array | Quantized, partition: P | Quantized) -> Array | Quantized:
    """Gathers a weight over the axes that only shard its storage; experts stay sharded."""
    if isinstance(w, Quantized):
        return jax.tree.map(_bring, w, partition)
    for axis, entry in enumerate(_of_values(partition)):
        if axis:
            w = gather_axis(w, tuple(a for a in mesh_axes(entry) if a in STORED), axis)
    return w


def _of_values(partition: P | Quantized) -> P:
    return partition.values if isinstance(partition, Quantized) else partition
