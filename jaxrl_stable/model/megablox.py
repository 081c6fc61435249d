"""Grouped products on TPU, with kernels for the forward product and both gradients.

XLA for TPU has a kernel for `jax.lax.ragged_dot` and for its gradient with respect to the rows, but
not for the gradient with respect to the matrices. For the latter, libtpu 0.0.42 multiplies all rows
by one mask per expert, which costs E times as much with E experts. This module computes that
gradient with JAX's `pallas.ops.tpu.megablox`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Float, Int

ROWS = 256  # rows per tile
WIDTH = 1024  # maximum width of a tile; two tiles, their product and copies share 16 MiB of VMEM


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_dot(
    x: Float[Array, "R D"],
    w: Float[Array, "E D F"],
    sizes: Int[Array, "E"],
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """Like `jax.lax.ragged_dot`; inside `jax.shard_map` it needs `check_vma=False`.

    Args:
      x: rows sorted by group; rows past the last group are ignored.
      w: one matrix per group.
      sizes: number of rows per group.
      interpret: whether to interpret the kernel, which is slow but works on any device; for tests.
    """
    return jax.lax.ragged_dot(x, w, sizes)


def _forward(
    x: Float[Array, "R D"], w: Float[Array, "E D F"], sizes: Int[Array, "E"], interpret: bool
) -> tuple[Float[Array, "R F"], tuple[Array, Array, Array]]:
    return ragged_dot(x, w, sizes), (x, w, sizes)


def _backward(
    interpret: bool,
    residuals: tuple[Float[Array, "R D"], Float[Array, "E D F"], Int[Array, "E"]],
    g: Float[Array, "R F"],
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"], np.ndarray]:
    x, w, sizes = residuals
    padding = (0, -x.shape[0] % ROWS), (0, 0)
    rows, columns = jnp.pad(x, padding), jnp.pad(g, padding)
    tiling = ROWS, _tile(x.shape[1]), _tile(g.shape[1])
    of_matrices = tgmm(rows.T, columns, sizes, w.dtype, tiling, interpret=interpret)
    of_rows = jax.lax.ragged_dot(g, w.swapaxes(1, 2), sizes)
    return of_rows, of_matrices, np.zeros(sizes.shape, jax.dtypes.float0)


ragged_dot.defvjp(_forward, _backward)


def _tile(size: int) -> int:
    """Returns the largest multiple of 128 up to WIDTH that divides `size`, else `size`."""
    return max((n for n in range(128, WIDTH + 1, 128) if size % n == 0), default=size)
