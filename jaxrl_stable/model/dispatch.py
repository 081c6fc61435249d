"""Grouped products: rows are sorted by expert and multiplied by their expert's matrix.

A pair is a token together with one of its K chosen experts. Tokens are never dropped. Pairs without
a local expert (padding, or an expert on another device) sort last and belong to no group. Groups
may be padded to a multiple of `block` rows, so that each block has one expert; a batched product
over blocks then replaces the ragged product. This blocked form is for CPUs, where
`jax.lax.ragged_dot` multiplies every row by every expert's matrix.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from jaxrl_stable.model.blocked import blocked_dot
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.parameters import Quantized
from jaxrl_stable.model.products import multiply


class ExpertWeights(NamedTuple):
    """Matrices of a layer's SwiGLU experts; E is the number of local experts.

    Attributes:
      gate, up: input projections in the compute dtype; `Quantized` if activations are quantised.
      down: output projection, stored like `gate` and `up`.
    """

    gate: Float[Array, "E D F"] | Quantized
    up: Float[Array, "E D F"] | Quantized
    down: Float[Array, "E F D"] | Quantized


class Groups(NamedTuple):
    """Placement of each (token, choice) pair in the sorted buffer of R rows.

    Attributes:
      source: index of the pair in each row; N * K if the row is unfilled.
      slot: row of each pair; R if the pair has no row.
      sizes: rows per expert, including block padding.
      block: rows per block; 1 if groups are not padded.
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
    across: tuple[str, ...] = (),
) -> Float[Array, "N D"]:
    """Returns the gate-weighted sum of the chosen experts' outputs per token.

    Args:
      weights: matrices of the local experts.
      tokens: activations.
      real: False on padding, for which the output is zero.
      chosen: distinct experts per token; ids outside 0 to E − 1 are not local and add nothing.
      gates: weight of each choice.
      config: selects the implementation of the products.
      across: inside `jax.shard_map`, mesh axes over which the expert width F is sharded.
    """
    E, (n, k) = weights.gate.shape[0], chosen.shape
    chosen = chosen.astype(jnp.int32)
    implementation = experts_implementation(config)
    if implementation == "dense":
        with jax.named_scope("experts"):
            outputs = _every_expert(weights, tokens, chosen, across)
        with jax.named_scope("combine"):
            here = (chosen >= 0) & (chosen < E) & real[:, None]
            return jnp.einsum("nkd,nk->nd", outputs, jnp.where(here, gates, 0))
    pairs = n * min(k, E)  # a token's experts are distinct, so at most this many pairs are local
    block = block_rows(pairs, E) if implementation == "blocked" else 1
    with jax.named_scope("dispatch"):
        groups = group_by_expert(chosen, real, E, block, pairs)
        rows = scatter_rows(tokens, groups.source, groups.slot)
    with jax.named_scope("experts"):
        rows = _swiglu(weights, rows, groups, implementation, across)
    with jax.named_scope("combine"):
        return jnp.einsum("nkd,nk->nd", take_rows(rows, groups.source, groups.slot), gates)


def apply_rows(
    weights: ExpertWeights,
    rows: Float[Array, "N D"],
    expert: Int[Array, "N"],
    config: ModelConfig,
    across: tuple[str, ...] = (),
) -> Float[Array, "N D"]:
    """Applies one expert to each row; the output is zero if the expert is not local."""
    gates = jnp.ones_like(rows, shape=(rows.shape[0], 1))
    real = jnp.ones_like(expert, dtype=bool)
    return apply_experts(weights, rows, real, expert[:, None], gates, config, across)


def _swiglu(
    weights: ExpertWeights,
    rows: Float[Array, "R D"],
    groups: Groups,
    implementation: str,
    across: tuple[str, ...],
) -> Float[Array, "R D"]:
    with jax.named_scope("gate"):
        gate = checkpoint_name(grouped_matmul(rows, weights.gate, groups, implementation), "gate")
    with jax.named_scope("up"):
        up = checkpoint_name(grouped_matmul(rows, weights.up, groups, implementation), "up")
    with jax.named_scope("down"):
        return grouped_matmul(jax.nn.silu(gate) * up, weights.down, groups, implementation, across)


def _every_expert(
    weights: ExpertWeights,
    tokens: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    across: tuple[str, ...],
) -> Float[Array, "N K D"]:
    """Applies every expert to every token; the reference that tests compare against."""

    def each(
        equation: str,
        x: Float[Array, "..."],
        w: Float[Array, "..."] | Quantized,
        across: tuple[str, ...] = (),
    ) -> Float[Array, "N E width"]:
        dot = lambda x, w, dtype: jnp.einsum(equation, x, w, preferred_element_type=dtype)  # noqa: E731
        return multiply(dot, x, w, lambda scale: scale[:, 0], across=across)

    hidden = jax.nn.silu(each("nd,edf->nef", tokens, weights.gate))
    hidden = hidden * each("nd,edf->nef", tokens, weights.up)
    every = each("nef,efd->ned", hidden, weights.down, across)
    return jnp.take_along_axis(every, chosen[..., None], axis=1, mode="clip")


def group_by_expert(
    experts: Int[Array, "N K"],
    real: Bool[Array, "N"],
    num_experts: int,
    block: int = 1,
    most: int | None = None,
) -> Groups:
    """Sorts (token, choice) pairs by expert, stably; pairs without a local expert get no row.

    Args:
      experts: expert ids; ids outside 0 to E − 1 are not local.
      real: False on padding tokens.
      num_experts: E, number of local experts.
      block: rows per block; see `Groups`.
      most: upper bound on the number of local pairs; the number of all pairs by default.
    """
    n, k = experts.shape
    most = n * k if most is None else most
    here = real[:, None] & (experts >= 0) & (experts < num_experts)
    ids = jnp.where(here, experts, num_experts).reshape(-1)
    order = stable_argsort(ids, num_experts)
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


def stable_argsort(ids: Int[Array, "n"], largest: int) -> Int[Array, "n"]:
    """Returns `jnp.argsort(ids, stable=True)` for ids from 0 to `largest`.

    Sorts a single key that combines id and position, which is six times as fast on a CPU.
    """
    n = ids.shape[0]
    if (largest + 1) * n > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(ids, stable=True)
    return jnp.sort(ids * n + jnp.arange(n)) % n


@partial(jax.custom_vjp, nondiff_argnums=())
def scatter_rows(
    x: Float[Array, "N D"], source: Int[Array, "R"], slot: Int[Array, "N K"]
) -> Float[Array, "R D"]:
    """Copies each token into its K rows of the buffer; unfilled rows are zero.

    Forward and backward passes are both gathers: a token's cotangent is the sum over its K rows.
    This avoids scatter-add, which is slow on TPU and sums in arbitrary order on GPU.
    """
    return x.at[source // slot.shape[1]].get(mode="fill", fill_value=0)


def _scatter_rows_fwd(
    x: Float[Array, "N D"], source: Int[Array, "R"], slot: Int[Array, "N K"]
) -> tuple[Float[Array, "R D"], tuple[Int[Array, "R"], Int[Array, "N K"]]]:
    return scatter_rows(x, source, slot), (source, slot)


def _scatter_rows_bwd(
    residuals: tuple[Int[Array, "R"], Int[Array, "N K"]], g: Float[Array, "R D"]
) -> tuple[Float[Array, "N D"], np.ndarray, np.ndarray]:
    source, slot = residuals
    return take_rows(g, source, slot).sum(1), _no_gradient(source), _no_gradient(slot)


@partial(jax.custom_vjp, nondiff_argnums=())
def take_rows(
    y: Float[Array, "R D"], source: Int[Array, "R"], slot: Int[Array, "N K"]
) -> Float[Array, "N K D"]:
    """Takes the K rows of each token from the buffer; pairs without a row yield zero.

    Summed over K, this is the transpose of `scatter_rows`.
    """
    return y.at[slot].get(mode="fill", fill_value=0)


def _take_rows_fwd(
    y: Float[Array, "R D"], source: Int[Array, "R"], slot: Int[Array, "N K"]
) -> tuple[Float[Array, "N K D"], tuple[Int[Array, "R"], Int[Array, "N K"]]]:
    return take_rows(y, source, slot), (source, slot)


def _take_rows_bwd(
    residuals: tuple[Int[Array, "R"], Int[Array, "N K"]], g: Float[Array, "N K D"]
) -> tuple[Float[Array, "R D"], np.ndarray, np.ndarray]:
    source, slot = residuals
    pairs = g.reshape(-1, g.shape[-1]).at[source].get(mode="fill", fill_value=0)
    return pairs, _no_gradient(source), _no_gradient(slot)


scatter_rows.defvjp(_scatter_rows_fwd, _scatter_rows_bwd)
take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)


def _no_gradient(indices: Int[Array, "..."]) -> np.ndarray:
    return np.zeros(indices.shape, jax.dtypes.float0)


def grouped_matmul(
    x: Float[Array, "R D"],
    w: Float[Array, "E D F"] | Quantized,
    groups: Groups,
    implementation: str,
    across: tuple[str, ...] = (),
) -> Float[Array, "R F"]:
    """Multiplies each group of rows by its expert's matrix.

    Rows outside all groups are set to zero, since kernels may leave arbitrary values there.

    Args:
      x: rows sorted by group.
      w: one matrix per group, as returned by `products.operand`.
      groups: placement of the rows.
      implementation: one of the names that `experts_implementation` returns.
      across: mesh axes over which D, the contracted dimension, is sharded. For the down projection
        that is the F of `apply_experts`.
    """
    if isinstance(w, Quantized) and implementation == "tokamax":
        # tokamax has few kernels for two quantised operands, and they differ between chips.
        w = dataclasses.replace(w, products="emulated")
    dot = partial(_grouped_dot, groups=groups, implementation=implementation)
    return multiply(dot, x, w, lambda scale: scale[_owner(groups, x.shape[0]), 0], across=across)


def _owner(groups: Groups, rows: int, block: int = 1) -> Int[Array, "blocks"]:
    """Returns the expert of each block of rows; past the last group, the last expert."""
    ends = jnp.cumsum(groups.sizes) // block
    owner = jnp.searchsorted(ends, jnp.arange(rows // block), side="right")
    return jnp.minimum(owner, groups.sizes.shape[0] - 1)


def _grouped_dot(
    x: Num[Array, "R D"],
    w: Num[Array, "E D F"],
    dtype: DTypeLike | None,
    *,
    groups: Groups,
    implementation: str,
) -> Num[Array, "R F"]:
    """Computes the product, accumulated in `dtype`; None means the dtype of `x`."""
    if implementation == "blocked":
        owner = _owner(groups, x.shape[0], groups.block)  # rows past the last group are zero
        return blocked_dot(x, w, owner, dtype)
    sizes = groups.sizes.astype(jnp.int32)
    sums = {} if dtype is None else {"preferred_element_type": dtype}
    if implementation == "tokamax":
        import tokamax

        # Allow only kernels: by default tokamax silently falls back to the plain op.
        kernels = ("mosaic", "triton") if jax.default_backend() == "gpu" else ("mosaic",)
        y = tokamax.ragged_dot(x, w, sizes, implementation=kernels, **sums)
    elif implementation == "megablox" and dtype is None:
        from jaxrl_stable.model.megablox import ragged_dot

        y = ragged_dot(x, w, sizes)
    else:
        y = jax.lax.ragged_dot(x, w, sizes, **sums)
    return jnp.where((jnp.arange(x.shape[0]) < sizes.sum())[:, None], y, 0)


def experts_implementation(config: ModelConfig, backend: str | None = None) -> str:
    """Resolves "auto": "blocked" on CPU, else tokamax's kernels if installed.

    Without tokamax, a TPU uses JAX's own kernels ("megablox").

    Args:
      config: model configuration.
      backend: "cpu", "gpu" or "tpu"; JAX's default backend if None.

    Returns:
      A value of `ModelConfig.experts` other than "auto".

    Raises:
      RuntimeError: on a GPU without tokamax, where `jax.lax.ragged_dot` is about 60 times slower.
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
                "grouped matrix products on a GPU need tokamax; run pip install "
                "'jaxrl_stable[kernels]', or accept the slow path with ModelConfig.experts='ragged'"
            ) from None
        return "megablox"
    return "tokamax"


def block_rows(pairs: int, num_experts: int) -> int:
    """Returns the number of rows per block: about a quarter of the mean rows per expert.

    It is rounded down to a power of two and clipped to between 8 and 128. On average, half of each
    expert's last block is padding, so blocks of this size waste about one eighth of the work.
    """
    return int(2 ** np.clip(np.floor(np.log2(max(pairs // (4 * num_experts), 1))), 3, 7))
