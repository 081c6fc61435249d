"""Splash attention on TPU, which never materialises `[T, T]` logits; supports context parallelism.

The kernel is JAX's own (`jax.experimental.pallas.ops.tpu.splash_attention`). Under context
parallelism, each device gathers the keys and values of all columns (only a few heads, thanks to
grouped queries) and computes attention for its own queries. Later columns attend to more columns,
so with contiguous columns the last device would do twice the average work. Columns are therefore
divided into 2c chunks, and device i of c handles the queries of chunks i and 2c − 1 − i
("zig-zag"). Queries and results are permuted only around the kernel; other modules, and routing,
never see this order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrl_stable.sharding import gather_axis
from jaxrl_stable.sharding.layout import Layout

LANES = 128  # sizes of the kernel's blocks and heads are multiples of this
BLOCK = 1024  # maximum number of rows in a block
FUSED = 8192  # maximum number of columns for which one kernel computes all gradients


def splash_attention(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T G hd"],
    v: Float[Array, "B T G vd"],
    segment_ids: Int[Array, "B T"],
    layout: Layout,
    interpret: bool = False,
) -> Float[Array, "B T H vd"]:
    """Computes softmax(q kᵀ) v per token, over its segment up to its own column.

    Args:
      q: queries, already scaled.
      k, v: keys and values; G divides H.
      segment_ids: segment of each token; 0 is padding, which attends to padding.
      layout: placement of rows and columns on the mesh.
      interpret: whether to interpret the kernel, which is slow but works on any device; for tests.

    Raises:
      ValueError: if columns are sharded and do not divide into the kernel's blocks.
    """
    T, H, width = *q.shape[1:3], v.shape[-1]
    context, tensor = layout.size(layout.columns), layout.present(("tensor",))
    parts = layout.size(tensor)
    if H % parts:
        tensor, parts = (), 1
    if k.shape[2] % parts:  # fewer key heads than devices: give each device the head it needs
        k, v = (jnp.repeat(x, H // k.shape[2], axis=2) for x in (k, v))
    if context > 1 and T % (2 * context * LANES):
        raise ValueError(
            f"{T} columns do not divide into blocks over context={context}; use a multiple of "
            f"{2 * context * LANES} (prompt width plus longest response)"
        )
    columns = -T % LANES
    pad = lambda x: jnp.pad(x, ((0, 0), (0, columns), (0, 0), (0, -x.shape[-1] % LANES)))  # noqa: E731
    q, k, v = map(pad, (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, columns)))

    kernel = _kernel(T + columns, H, context, parts, interpret)
    y = _over_mesh(kernel, q, k, v, segment_ids, layout, tensor)
    return y[:, :T, :, :width]


def _over_mesh(
    kernel: kernels.SplashAttentionKernel,
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T G hd"],
    v: Float[Array, "B T G vd"],
    segment_ids: Int[Array, "B T"],
    layout: Layout,
    tensor: tuple[str, ...],
) -> Float[Array, "B T H vd"]:
    """Runs the kernel on each device's own rows, columns and heads."""

    def local(
        kernel: kernels.SplashAttentionKernel,
        q: Float[Array, "b t h hd"],
        k: Float[Array, "b t g hd"],
        v: Float[Array, "b t g vd"],
        segments: Int[Array, "b t"],
    ) -> Float[Array, "b t h vd"]:  # sizes on one device
        ours = segments
        if layout.columns:
            k, v, segments = (gather_axis(x, layout.columns, 1) for x in (k, v, segments))
            q, ours = zigzag(q, layout), zigzag(ours, layout)
        heads_first = lambda x: x.transpose(0, 2, 1, 3)  # noqa: E731
        ids = kernels.SegmentIds(ours, segments)
        y = jax.vmap(kernel)(*map(heads_first, (q, k, v)), ids).transpose(0, 2, 1, 3)
        return zigzag(y, layout, back=True) if layout.columns else y

    if not layout.shape:
        return local(kernel, q, k, v, segment_ids)
    mesh = jax.sharding.get_abstract_mesh()
    heads = tensor or None
    of_kernel = NamedSharding(mesh, P(heads, layout.columns or None))
    each = layout.spec(heads, None)
    return jax.shard_map(
        local,
        in_specs=(kernel.manual_sharding_spec(of_kernel), each, each, each, layout.spec()),
        out_specs=each,
        check_vma=False,  # the kernel's output types do not record how outputs vary over the mesh
    )(kernel, q, k, v, segment_ids)


def zigzag(x: Array, layout: Layout, back: bool = False) -> Array:
    """Permutes columns: device i has two adjacent chunks and receives `chunks(c)[i]`."""
    c = layout.size(layout.columns)
    order = chunks(c)
    owner = {chunk: device for device, pair in enumerate(order) for chunk in pair}
    halves = jnp.split(x, 2, axis=1)
    moved = []
    for half in (0, 1):
        pairs = [(device, owner[2 * device + half]) for device in range(c)]
        if back:
            pairs = [(there, here) for here, there in pairs]
        moved.append(jax.lax.ppermute(halves[half], layout.columns, pairs))
    return jnp.concatenate(moved, axis=1)


def chunks(c: int) -> list[tuple[int, int]]:
    """Returns, for each device, the two of 2c chunks whose queries it handles, even chunk first."""
    pairs = [(i, 2 * c - 1 - i) for i in range(c)]
    return [tuple(sorted(pair, key=lambda chunk: chunk % 2)) for pair in pairs]


class _ZigZagMask(masks._ComputableMask):
    """Causal mask whose rows are in the order of `chunks`."""

    def __init__(self, columns: int, context: int) -> None:
        super().__init__((columns, columns), lambda rows, cols: rows >= cols)
        if context > 1:
            order = np.array(chunks(context)).ravel()
            self.q_sequence = self.q_sequence.reshape(2 * context, -1)[order].ravel()
        self.context = context

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _ZigZagMask):
            return NotImplemented
        return (self.shape, self.context) == (other.shape, other.context)

    def __hash__(self) -> int:
        return hash((type(self), self.shape, self.context))


def _kernel(
    columns: int, heads: int, context: int, tensor: int, interpret: bool
) -> kernels.SplashAttentionKernel:
    rows = _block(columns // context)
    keys = _block(columns)
    # A single backward kernel is faster but stores a query gradient per block of keys.
    fused = columns <= FUSED
    sizes = kernels.BlockSizes(
        block_q=rows,
        block_kv=keys,
        block_q_dkv=rows,
        block_kv_dkv=keys,
        block_q_dq=None if fused else rows,
        block_kv_dq=None if fused else keys,
        use_fused_bwd_kernel=fused,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([_ZigZagMask(columns, context)] * heads),
        block_sizes=sizes,
        head_shards=tensor,
        q_seq_shards=context,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )


def _block(columns: int) -> int:
    """Returns the largest multiple of LANES up to BLOCK that divides `columns`."""
    units = columns // LANES
    return LANES * max(n for n in range(1, BLOCK // LANES + 1) if units % n == 0)
