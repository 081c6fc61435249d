"""Bytes on the wire of programs whose answer is known, compiled for small slices and for CPUs."""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_stable.aot.collectives import bytes_by_kind, collectives, spanned_axes
from jaxrl_stable.aot.hlo import parse
from tests.aot.slices import abstract, chained, compiled

LAYERS, D, ROWS = 6, 512, 64


def scanned(mesh):
    """A scan whose weights are gathered layer by layer."""

    def forward(weights, x):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, jax.NamedSharding(mesh, P()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, weights)[0]

    return forward


def sent(module, devices=8, slices=1):
    return bytes_by_kind(collectives(module, devices, slices))


def test_a_scan_sends_once_for_each_layer(slice_of):
    mesh = slice_of("v5e:2x4", (2, 4), ("data", "fsdp"))
    weights = abstract(mesh, (LAYERS, D, D), None, "fsdp")
    module, _ = compiled(scanned(mesh), weights, abstract(mesh, (ROWS, D), "data"))
    assert sent(module) == {"all-gather": LAYERS * 3 / 4 * D * D * 2}
    (gather,) = collectives(module, 8)
    assert (gather.times, gather.size, gather.network) == (LAYERS, 4, "ici")
    assert gather.op_name.startswith("jit(forward)/while/body")


def test_nested_loops_multiply(slice_of):
    mesh = slice_of("v5e:2x4", (2, 4), ("data", "fsdp"))

    def accumulate(weights, xs):
        run = scanned(mesh)
        return jax.lax.scan(lambda total, x: (total + run(weights, x), None), xs[0], xs)[0]

    weights = abstract(mesh, (LAYERS, D, D), None, "fsdp")
    module, _ = compiled(accumulate, weights, abstract(mesh, (5, ROWS, D), None, "data"))
    assert sent(module) == {"all-gather": 5 * LAYERS * 3 / 4 * D * D * 2}


def test_each_kind_inside_shard_map(slice_of):
    """Reduce-scatter, permutation and exchange, each with its own group."""
    mesh = slice_of("v5e:2x4", (2, 4), ("data", "fsdp"))

    def local(x):
        part = jax.lax.psum_scatter(x * 2, "fsdp", scatter_dimension=0, tiled=True)
        moved = jax.lax.ppermute(part, "data", [(0, 1), (1, 0)])
        changed = jax.lax.all_to_all(moved * 3, "fsdp", split_axis=1, concat_axis=0, tiled=True)
        return changed + jax.lax.psum(changed * 5, "data")

    function = jax.shard_map(
        local, mesh=mesh, in_specs=P(), out_specs=P(("data", "fsdp")), check_vma=False
    )
    module, _ = compiled(function, abstract(mesh, (D, 4 * D)))
    whole = D * 4 * D * 2
    assert sent(module) == {
        "reduce-scatter": 3 / 4 * whole,
        "collective-permute": whole / 4,
        "all-to-all": 3 / 4 * whole / 4,
        "all-reduce": 2 * 1 / 2 * whole / 4,
    }


def test_an_iteration_of_a_loop_of_unknown_length_stands_alone(slice_of):
    mesh = slice_of("v5e:2x4", (2, 4), ("data", "fsdp"))

    def decode(w, x):
        whole = partial(jax.lax.with_sharding_constraint, shardings=jax.NamedSharding(mesh, P()))
        body = lambda x: jnp.tanh(x @ whole(w * x[0, 0]))  # noqa: E731
        return jax.lax.while_loop(lambda x: x.sum() < 9, body, x)

    module, _ = compiled(decode, abstract(mesh, (D, D), "fsdp"), abstract(mesh, (8, D)))
    found = collectives(module, 8)
    (loop,) = {each.loop for each in found}
    assert loop
    assert bytes_by_kind(found) == {}
    assert bytes_by_kind(found, loop) == {"all-gather": 3 / 4 * D * D * 2}


def test_between_slices_the_bytes_go_over_dcn(slice_of):
    """The gradient is summed over slices after a reduce-scatter within each slice."""
    mesh = slice_of("v6e:2x2*2", (2, 4), ("data", "fsdp"))

    def local(x):
        part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(part, "data")

    function = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("fsdp"), check_vma=False)
    module, _ = compiled(function, abstract(mesh, (D, 2048)))
    found = collectives(module, devices=4, slices=2)
    over_dcn = sum(each.sent for each in found if each.network == "dcn")
    within = sum(each.sent for each in found if each.network == "ici")
    assert over_dcn == 2 * 1 / 2 * D * 2048 * 2 / 4
    assert within >= 3 / 4 * D * 2048 * 2


def test_an_all_gather_over_a_whole_3d_slice_becomes_an_all_reduce(slice_of):
    """The reason why no weight is sharded over all chips of a slice: it costs twice the bytes."""
    mesh = slice_of("v5p:4x4x4", (64,), ("fsdp",))
    function = jax.shard_map(
        lambda x: jax.lax.all_gather(x, "fsdp", axis=0, tiled=True) * 2,
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P(),
        check_vma=False,
    )
    module, _ = compiled(function, abstract(mesh, (2048, 4096), "fsdp"))
    (only,) = collectives(module, 64)
    assert (only.kind, only.gathers) == ("all-reduce", True)
    assert only.sent == 2 * 63 / 64 * 2048 * 4096 * 2


def test_an_asynchronous_pair_counts_once():
    text = """\
HloModule example
ENTRY %main (a: bf16[8,4]) -> bf16[32,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %done = bf16[32,4]{1,0} all-gather-done(%start)
  %move = (bf16[32,4]{1,0}, bf16[32,4]{1,0}, u32[], u32[]) collective-permute-start(%done), \
source_target_pairs={{0,1},{1,0},{2,2},{3,3}}
  ROOT %moved = bf16[32,4]{1,0} collective-permute-done(%move)
}
"""
    assert sent(parse(text), devices=4) == {"all-gather": 3 * 64, "collective-permute": 256}


def test_a_collective_inside_a_fusion_and_an_asynchronous_call_count():
    text = """\
HloModule example
%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %z = bf16[] add(%x, %y)
}
%inside (b: bf16[8,4]) -> bf16[8,4] {
  %b = bf16[8,4]{1,0} parameter(0)
  ROOT %r = bf16[8,4]{1,0} all-reduce(%b), replica_groups=[1,4]<=[4], to_apply=%sum
}
%called (c: bf16[8,4]) -> bf16[2,4] {
  %c = bf16[8,4]{1,0} parameter(0)
  ROOT %s = bf16[2,4]{1,0} reduce-scatter(%c), replica_groups=[1,4]<=[4], to_apply=%sum
}
ENTRY %main (a: bf16[8,4]) -> bf16[2,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %f = bf16[8,4]{1,0} fusion(%a), kind=kCustom, calls=%inside
  %start = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}) async-start(%f), calls=%called
  ROOT %done = bf16[2,4]{1,0} async-done(%start)
}
"""
    expected = {"all-reduce": 2 * 3 / 4 * 64, "reduce-scatter": 3 / 4 * 64}
    assert sent(parse(text), devices=4) == expected


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    text = """\
HloModule example
%all-reduce-scatter.1 (b: bf16[8,4]) -> bf16[2,4] {
  %b = bf16[8,4]{1,0} parameter(0)
  %r = bf16[8,4]{1,0} all-reduce(%b), replica_groups=[1,4]<=[4], to_apply=%sum
  %i = u32[] partition-id()
  ROOT %s = bf16[2,4]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,4}
}
ENTRY %main (a: bf16[8,4]) -> bf16[2,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %f = bf16[2,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert sent(parse(text), devices=4) == {"reduce-scatter": 3 / 4 * 64}


def test_spanned_axes():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert spanned_axes((0, 1), places) == 1
    assert spanned_axes((0, 3), places) == 2
    assert spanned_axes((2,), places) == 0


ON_CPU = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests.aot.slices import abstract, chained, compiled
from tests.aot.test_collectives import D, LAYERS, ROWS, scanned, sent
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
weights = abstract(mesh, (LAYERS, D, D), None, "fsdp", dtype="float32")
module, _ = compiled(scanned(mesh), weights, abstract(mesh, (ROWS, D), "data", dtype="float32"))
print(json.dumps(sent(module)))
"""


def test_eight_cpus_print_the_same_program_another_way():
    found = subprocess.run(
        [sys.executable, "-c", ON_CPU],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == {"all-gather": LAYERS * 3 / 4 * D * D * 4}


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_a_group_of_one_sends_nothing(kind):
    text = f"""\
HloModule example
ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} {kind}(%a), replica_groups={{{{0}},{{1}}}}
}}
"""
    assert sent(parse(text), devices=2) == {}


def test_a_collective_spread_over_fusions_counts_once():
    assert sent(parse(chained()), devices=4) == {"all-gather": 2 * 3 * 64}
