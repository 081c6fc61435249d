"""Grouped products: rows sorted by expert, each expert's rows multiplied by its own matrix.

Tokens are never dropped. Rows that belong to no expert (padding) come last and stay out of every
group. Groups may be padded to a multiple of `block` rows, so that a block has one expert: a batched
product over blocks then replaces the ragged one. That form exists for the CPU, where
`jax.lax.ragged_dot` multiplies every row by every expert's matrix.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_stable.model.config import ModelConfig


class Groups(NamedTuple):
    """Where each (token, choice) pair stands in the sorted buffer of R rows.

    Attributes:
      source: pair that fills a row; N * K where none does.
      slot: row of each pair; outside every group for padding.
      sizes: rows of each expert, block padding included.
      block: rows of a block; 1 when groups are not padded.
    """

    source: Int[Array, "R"]
    slot: Int[Array, "N K"]
    sizes: Int[Array, "E"]
    block: int


def group_by_expert(
    experts: Int[Array, "N K"], real: Bool[Array, "N"], num_experts: int, block: int
) -> Groups:
    """Sorts (token, choice) pairs by expert, stably; pairs of padding tokens go last."""
    n, k = experts.shape
    ids = jnp.where(real[:, None], experts, num_experts).reshape(-1)
    order = jnp.argsort(ids, stable=True)
    counts = jnp.bincount(ids, length=num_experts + 1)
    padded = counts if block == 1 else (counts + block - 1) // block * block
    start, padded_start = jnp.cumsum(counts) - counts, jnp.cumsum(padded) - padded
    sorted_ids = ids[order]
    rows = padded_start[sorted_ids] + jnp.arange(n * k) - start[sorted_ids]
    capacity = n * k if block == 1 else -(-(n * k + num_experts * (block - 1)) // block) * block
    pairs = jnp.where(sorted_ids < num_experts, order, n * k)  # rows of padding stay unfilled
    source = jnp.full((capacity,), n * k, order.dtype).at[rows].set(pairs, mode="drop")
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
    n, k = slot.shape
    return jnp.where((source < n * k)[:, None], x[source // k], 0)


def _scatter_rows_fwd(x, source, slot):
    return scatter_rows(x, source, slot), (source, slot)


def _scatter_rows_bwd(residuals, g):
    source, slot = residuals
    g = jnp.where((source < slot.size)[:, None], g, 0)  # a kernel may leave anything elsewhere
    return gather_rows(g, source, slot).sum(1), _no_gradient(source), _no_gradient(slot)


@partial(jax.custom_vjp, nondiff_argnums=())
def gather_rows(
    y: Float[Array, "R D"], source: Int[Array, "R"], slot: Int[Array, "N K"]
) -> Float[Array, "N K D"]:
    """Brings the K rows of each token back: the transpose of `scatter_rows`, before its sum."""
    return y[slot]


def _gather_rows_fwd(y, source, slot):
    return gather_rows(y, source, slot), (source, slot)


def _gather_rows_bwd(residuals, g):
    source, slot = residuals
    pairs = g.reshape(-1, g.shape[-1])
    filled = (source < slot.size)[:, None]
    return (
        jnp.where(filled, pairs[jnp.minimum(source, slot.size - 1)], 0),
        _no_gradient(source),
        _no_gradient(slot),
    )


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
    else:
        y = jax.lax.ragged_dot(x, w, sizes)
    return jnp.where((jnp.arange(x.shape[0]) < sizes.sum())[:, None], y, 0)


def experts_implementation(config: ModelConfig) -> str:
    """Resolves "auto": blocks on CPU, tokamax's kernel on TPU and GPU where it is installed.

    On a TPU `jax.lax.ragged_dot` is a kernel of its own.

    Raises:
      RuntimeError: on a GPU without tokamax, where `jax.lax.ragged_dot` is some sixty times slower.
    """
    if config.experts != "auto":
        return config.experts
    backend = jax.default_backend()
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
        return "ragged"
    return "tokamax"


def block_rows(pairs: int, num_experts: int) -> int:
    """Rows of a block: a power of two near a quarter of the mean group, between 8 and 128.

    On average half a block per expert is multiplied in vain; a quarter keeps that near an eighth.
    """
    return int(2 ** np.clip(np.floor(np.log2(max(pairs // (4 * num_experts), 1))), 3, 7))
