"""Shapes on small slices, for the tests in this folder."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_stable.aot import hlo


def abstract(mesh, shape, *spec, dtype="bfloat16"):
    """Returns a shape with a sharding."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compiled(function, *arguments):
    """Returns the parsed program and the executable."""
    executable = jax.jit(function).lower(*arguments).compile()
    return hlo.parse(executable.as_text()), executable


def chained():
    """Returns two gathers of 64 to 256 bytes that overlap with other work, as libtpu writes them.

    The first one is spread over three fusions, each of which does a part.
    """
    fusion = """\
%part.{i} (b.{i}: bf16[8,4]) -> bf16[32,4] {{
  %b.{i} = bf16[8,4]{{1,0}} parameter(0)
  ROOT %g.{i} = bf16[32,4]{{1,0}} all-gather(%b.{i}), channel_id={channel}, \
replica_groups=[1,4]<=[4], dimensions={{0}}, frontend_attributes={{chain_id="0"}}
}}
"""
    bodies = [fusion.format(i=i, channel=channel) for i, channel in enumerate((7, 7, 7, 8))]
    calls = [
        f"  %f.{i} = bf16[32,4]{{1,0}} fusion(%a), kind=kCustom, calls=%part.{i}" for i in range(4)
    ]
    entry = "ENTRY %main (a: bf16[8,4]) -> bf16[32,4] {"
    begin, end = "  %a = bf16[8,4]{1,0} parameter(0)", "  ROOT %r = bf16[32,4]{1,0} add(%f.0, %f.3)"
    return "\n".join(["HloModule example", *bodies, entry, begin, *calls, end, "}", ""])
