"""FLOPs and bytes of programs with known answers; XLA's own count if there is no loop."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from jaxrl_stable.aot.hlo import parse
from jaxrl_stable.aot.loops import steps
from jaxrl_stable.aot.work import kernel_flops, work
from jaxrl_stable.model.config import tiny
from jaxrl_stable.model.megablox import ragged_dot
from tests.aot.slices import abstract, chained, compiled


@pytest.fixture
def mesh(slice_of):
    return slice_of("v5e:2x2", (4,), ("x",))


def test_a_product_reads_its_operands_and_writes_its_result(mesh):
    shapes = abstract(mesh, (4096, 2048)), abstract(mesh, (2048, 8192))
    module, executable = compiled(jnp.matmul, *shapes)
    done = work(module)
    assert done.flops == 2 * 4096 * 2048 * 8192 == executable.cost_analysis()["flops"]
    once = 2 * (4096 * 2048 + 2048 * 8192 + 4096 * 8192)
    assert once <= done.hbm_bytes < 1.2 * once
    assert done.unknown == ()


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(8, 512, 256), (8, 256, 1024)]),
        (lambda a, b: jnp.einsum("bij,bik->jk", a, b), [(8, 512, 256), (8, 512, 1024)]),
        (
            lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME"),
            [(8, 64, 64, 64), (128, 64, 3, 3)],
        ),
    ],
)
def test_products_agree_with_xla(mesh, function, shapes):
    module, executable = compiled(function, *(abstract(mesh, shape) for shape in shapes))
    # What is left is elementwise: conversions inside the same fusions.
    assert work(module).flops == pytest.approx(executable.cost_analysis()["flops"], rel=0.02)


def test_loops_multiply_where_xla_counts_one_iteration(mesh):
    def layers(ws, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    module, executable = compiled(layers, abstract(mesh, (6, 512, 512)), abstract(mesh, (256, 512)))
    once = 2 * 256 * 512 * 512
    assert work(module).flops == 6 * once
    assert executable.cost_analysis()["flops"] < 1.1 * once


def test_an_iteration_of_a_loop_of_unknown_length_stands_alone(mesh):
    def decode(w, x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ w), x @ (2 * w))

    module, _ = compiled(decode, abstract(mesh, (512, 512)), abstract(mesh, (64, 512)))
    (loop,) = {step.loop for step in steps(module)} - {""}
    assert work(module).flops == work(module, loop).flops == 2 * 64 * 512 * 512


def test_a_slice_of_a_stack_moves_itself(mesh):
    """A layer's weights are read once, not the whole stack for every layer."""
    shapes = abstract(mesh, (12, 2048, 2048)), abstract(mesh, (8, 2048))
    module, _ = compiled(
        lambda ws, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], *shapes
    )
    stack = 12 * 2048 * 2048 * 2
    assert stack <= work(module).hbm_bytes < 1.3 * stack


def test_grouped_products_count_the_rows_that_a_chip_gets(mesh):
    """Of 8 choices among 16 experts, 2 fall on this chip's 4 experts, which have room for 4."""
    rows, experts, d, f = 4096, 4, 512, 256
    config = tiny(num_experts=16, num_experts_per_token=8)
    shapes = (
        abstract(mesh, (rows, d)),
        abstract(mesh, (experts, d, f)),
        abstract(mesh, (experts,), dtype="int32"),
    )

    def products(x, w, sizes):
        y, pull = jax.vjp(lambda x, w: ragged_dot(x, w, sizes), x, w)
        return pull(y)

    local = jax.shard_map(products, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    module, _ = compiled(local, *shapes)
    product = 2 * rows * d * f
    assert work(module).flops == 3 * product  # full buffers, as the kernels declare
    done = work(module, kernel_flops=kernel_flops(config))
    assert done.flops == 3 * product / 2
    assert done.unknown == ()


def test_splash_attention_counts_half_of_the_pairs(mesh):
    heads, columns, width = 4, 1024, 128
    sizes = splash.BlockSizes(
        block_q=512, block_kv=512, block_q_dkv=512, block_kv_dkv=512, use_fused_bwd_kernel=True
    )
    mask = masks.MultiHeadMask([masks.CausalMask((columns, columns))] * heads)

    def loss(q, k, v):
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        return kernel(q, k, v).astype(jnp.float32).sum()

    shape = abstract(mesh, (heads, columns, width))
    gradients = jax.shard_map(  # on every chip in full
        jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    module, _ = compiled(gradients, shape, shape, shape)
    assert len(work(module).unknown) == 2  # forward and backward declare nothing
    done = work(module, kernel_flops=kernel_flops(tiny()))
    product = 2 * heads * columns * columns * width / 2
    assert done.flops == (2 + 5) * product
    assert done.unknown == ()


def test_a_slice_behind_a_change_of_layout_moves_itself():
    """The compiler may wrap a change of layout in a fusion of its own, inside another fusion."""
    text = """\
HloModule example
%turned (i: s8[12,64,128]) -> s8[12,64,128] {
  %i = s8[12,64,128]{2,1,0} parameter(0)
  ROOT %c = s8[12,64,128]{1,2,0} copy(%i)
}
%layer (w: s8[12,64,128], n: s32[]) -> bf16[1,64,128] {
  %w = s8[12,64,128]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %f = s8[12,64,128]{1,2,0} fusion(%w), kind=kLoop, calls=%turned
  %s = s8[1,64,128]{1,2,0} dynamic-slice(%f, %n, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %r = bf16[1,64,128]{1,2,0} convert(%s)
}
ENTRY %main (w: s8[12,64,128], n: s32[]) -> bf16[1,64,128] {
  %w = s8[12,64,128]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %r = bf16[1,64,128]{1,2,0} fusion(%w, %n), kind=kLoop, calls=%layer
}
"""
    index = 4
    assert work(parse(text)).hbm_bytes == index + 64 * 128 + 2 * 64 * 128


def test_what_a_collective_moves_beside_fusions_counts_once():
    gathers, addition = 2 * (64 + 256), 3 * 256
    assert work(parse(chained())).hbm_bytes == gathers + addition
