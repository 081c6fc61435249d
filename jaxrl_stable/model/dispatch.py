"""Grouped products: rows sorted by expert, each expert's rows multiplied by its own matrix.

Tokens are never dropped. Pairs that belong to no expert here (padding, or an expert of another
device) come last and stay out of every group. Groups may be padded to a multiple of `block` rows,
so that a block has one expert: a batched product over blocks then replaces the ragged one. That
form exists for the CPU, where `jax.lax.ragged_dot` multiplies every row by every expert's matrix.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable.model.config import ModelConfig


class ExpertWeights(NamedTuple):
    """The matrices of a layer's SwiGLU experts, in the compute type; E counts those that are here.

    Attributes:
      gate, up: into the experts.
      down: out of them.
    """

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


class Groups(NamedTuple):
    """Where each (token, choice) pair stands in the sorted buffer of R rows.

    Attributes:
      source: pair that fills a row; N * K where none does.
      slot: row of each pair; R for a pair that has none.
      sizes: rows of each expert, block padding included.
      block: rows of a block; 1 when groups are not padded.
    """

    source: Int[Array, "R"]
    slot: Int[Array, "N K"]
    sizes: Int[Array, "E"]
    block: int


def apply_experts(
    weights: ExpertWeights,
    tokens: Float[Array, "N D"],
    real: Bool[Array, "N"],
    chosen: Int[Array, "N K"],
    gates: Float[Array, "N K"],
    config: ModelConfig,
) -> Float[Array, "N D"]:
    """Weighted sum of what the chosen experts make of each token.

    Args:
      weights: the experts that are here.
      tokens: activations.
      real: False on padding, which comes out as zero.
      chosen: experts of each token, different ones; ids outside of 0 to E − 1 are not here and add
        nothing.
      gates: weight of each choice.
      config: says how the products are computed.
    """
    E, (n, k) = weights.gate.shape[0], chosen.shape
    chosen = chosen.astype(jnp.int32)
    implementation = experts_implementation(config)
    if implementation == "dense":
        outputs = _every_expert(weights, tokens, chosen)
        here = (chosen >= 0) & (chosen < E) & real[:, None]
        return jnp.einsum("nkd,nk->nd", outputs, jnp.where(here, gates, 0))
    pairs = n * min(k, E)  # experts of a token differ: no more of them can be here
    block = block_rows(pairs, E) if implementation == "blocked" else 1
    groups = group_by_expert(chosen, real, E, block, pairs)
    rows = scatter_rows(tokens, groups.source, groups.slot)
    rows = _swiglu(weights, rows, groups, implementation)
    return jnp.einsum("nkd,nk->nd", gather_rows(rows, groups.source, groups.slot), gates)


def apply_rows(
    weights: ExpertWeights, rows: Float[Array, "N D"], expert: Int[Array, "N"], config: ModelConfig
) -> Float[Array, "N D"]:
    """Each row through its one expert; rows of an expert that is not here come out as zero."""
    gates = jnp.ones_like(rows, shape=(rows.shape[0], 1))
    real = jnp.ones_like(expert, dtype=bool)
    return apply_experts(weights, rows, real, expert[:, None], gates, config)


def _swiglu(weights: ExpertWeights, rows, groups: Groups, implementation: str):
    gate = checkpoint_name(grouped_matmul(rows, weights.gate, groups, implementation), "gate")
    up = checkpoint_name(grouped_matmul(rows, weights.up, groups, implementation), "up")
    return grouped_matmul(jax.nn.silu(gate) * up, weights.down, groups, implementation)


def _every_expert(weights: ExpertWeights, tokens, chosen) -> Float[Array, "N K D"]:
    """Every expert on every token: the oracle of tests."""
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", tokens, weights.gate))
    hidden = hidden * jnp.einsum("nd,edf->nef", tokens, weights.up)
    every = jnp.einsum("nef,efd->ned", hidden, weights.down)
    return jnp.take_along_axis(every, chosen[..., None], axis=1, mode="clip")


def group_by_expert(
    experts: Int[Array, "N K"],
    real: Bool[Array, "N"],
    num_experts: int,
    block: int = 1,
    most: int | None = None,
) -> Groups:
    """Sorts (token, choice) pairs by expert, stably; pairs without an expert here have no row.

    Args:
      experts: ids; those outside of 0 to E − 1 are not here.
      real: False on padding tokens.
      num_experts: E.
      block: see `Groups`.
      most: pairs that can be here at once; all by default.
    """
    n, k = experts.shape
    most = n * k if most is None else most
    here = real[:, None] & (experts >= 0) & (experts < num_experts)
    ids = jnp.where(here, experts, num_experts).reshape(-1)
    order = jnp.argsort(ids, stable=True)
    counts = jnp.bincount(ids, length=num_experts + 1)
    padded = counts if block == 1 else (counts + block - 1) // block * block
    start, padded_start = jnp.cumsum(counts) - counts, jnp.cumsum(padded) - padded
    capacity = most if block == 1 else -(-(most + num_experts * (block - 1)) // block) * block
    sorted_ids = ids[order]
    rows = padded_start[sorted_ids] + jnp.arange(n * k) - start[sorted_ids]
    rows = jnp.where(sorted_ids < num_experts, rows, capacity)
    source = jnp.full((capacity,), n * k, order.dtype).at[rows].set(order, mode="drop")
    slot = jnp.zeros((n * k,), rows.dtype).at[order].set(rows).reshape(n, k)
    return Groups(source, slot, padded[:num_experts], block)


@partial(jax.custom_vjp, nondiff_argnums=())
def scatter_rows(
    x: Float[Array, "N D"], source: Int[Array, "R"], slot: Int[Array, "N K"]
) -> Float[Array, "R D"]:
    """Copies each token into its K rows of the buffer; unfilled rows are zero.

    Forward and backward are both gathers: the cotangent of a token is the sum over its K rows, so
    no scatter-add (slow on TPU, unordered on GPU) is ever built.
    """
    return x.at[source // slot.shape[1]].get(mode="fill", fill_value=0)


def _scatter_rows_fwd(x, source, slot):
    return scatter_rows(x, source, slot), (source, slot)


def _scatter_rows_bwd(residuals, g):
    source, slot = residuals
    return gather_rows(g, source, slot).sum(1), _no_gradient(source), _no_gradient(slot)


@partial(jax.custom_vjp, nondiff_argnums=())
def gather_rows(
    y: Float[Array, "R D"], source: Int[Array, "R"], slot: Int[Array, "N K"]
) -> Float[Array, "N K D"]:
    """Brings the K rows of each token back: the transpose of `scatter_rows`, before its sum.

    What has no row here is zero.
    """
    return y.at[slot].get(mode="fill", fill_value=0)


def _gather_rows_fwd(y, source, slot):
    return gather_rows(y, source, slot), (source, slot)


def _gather_rows_bwd(residuals, g):
    source, slot = residuals
    pairs = g.reshape(-1, g.shape[-1]).at[source].get(mode="fill", fill_value=0)
    return pairs, _no_gradient(source), _no_gradient(slot)


scatter_rows.defvjp(_scatter_rows_fwd, _scatter_rows_bwd)
gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


def _no_gradient(indices: Int[Array, "..."]) -> np.ndarray:
    return np.zeros(indices.shape, jax.dtypes.float0)


def grouped_matmul(
    x: Float[Array, "R D"], w: Float[Array, "E D F"], groups: Groups, implementation: str
) -> Float[Array, "R F"]:
    """Multiplies each group of rows by its expert's matrix.

    Rows outside every group come out as zero whatever the kernel leaves there.
    """
    if implementation == "blocked":
        blocks = x.reshape(-1, groups.block, x.shape[-1])
        ends = jnp.cumsum(groups.sizes) // groups.block
        owner = jnp.searchsorted(ends, jnp.arange(blocks.shape[0]), side="right")
        owner = jnp.minimum(owner, w.shape[0] - 1)  # blocks past the last group hold zeros
        return jnp.einsum("nbd,ndf->nbf", blocks, w[owner]).reshape(x.shape[0], -1)
    sizes = groups.sizes.astype(jnp.int32)
    if implementation == "tokamax":
        import tokamax

        # Kernels only: left to itself it would fall back to the plain op without a word.
        kernels = ("mosaic", "triton") if jax.default_backend() == "gpu" else ("mosaic",)
        y = tokamax.ragged_dot(x, w, sizes, implementation=kernels)
    elif implementation == "megablox":
        from jaxrl_stable.model.megablox import ragged_dot

        y = ragged_dot(x, w, sizes)
    else:
        y = jax.lax.ragged_dot(x, w, sizes)
    return jnp.where((jnp.arange(x.shape[0]) < sizes.sum())[:, None], y, 0)


def experts_implementation(config: ModelConfig, backend: str | None = None) -> str:
    """Resolves "auto": blocks on CPU, tokamax's kernels on TPU and GPU where it is installed.

    On a TPU JAX has kernels of its own.

    Args:
      config: of the model.
      backend: "cpu", "gpu" or "tpu"; this machine's by default.

    Raises:
      RuntimeError: on a GPU without tokamax, where `jax.lax.ragged_dot` is some sixty times slower.
    """
    if config.experts != "auto":
        return config.experts
    backend = backend or jax.default_backend()
    if backend == "cpu":
        return "blocked"
    try:
        import tokamax  # noqa: F401
    except ImportError:
        if backend == "gpu":
            raise RuntimeError(
                "grouped matrix products on a GPU need tokamax: pip "
                "install 'jaxrl_stable[kernels]', or accept the slow path with "
                "ModelConfig.experts='ragged'"
            ) from None
        return "megablox"
    return "tokamax"


def block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block: a power of two near a quarter of the mean group, between 8 and 128.

    On average half a block per expert is multiplied in vain; a quarter keeps that near an eighth.
    """
    return int(2 ** np.clip(np.floor(np.log2(max(pairs // (4 * num_experts), 1))), 3, 7))
