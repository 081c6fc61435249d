"""What is read from handwritten programs, and how often each instruction runs."""

import pytest

from jaxrl_stable.aot.hlo import parse
from jaxrl_stable.aot.loops import steps, trip_count

PROGRAM = """\
HloModule example

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0:T(128)S(1)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %y = f32[4]{{0}} negate(%x), metadata={{op_name="jit(f)/while/body/neg"}}
  ROOT %out = (s32[], f32[4]{{0}}) tuple(%next, %y)
}}

%condition (q: (s32[], f32[4])) -> pred[] {{
  %q = (s32[], f32[4]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare({compared}), direction={direction}
}}

ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %init = (s32[], f32[4]{{0}}) tuple(%copied, %a)
  %loop = (s32[], f32[4]{{0}}) while(%init), condition=%condition, body=%body{noted}
  ROOT %result = f32[4]{{0}} get-tuple-element(%loop), index=1
}}
"""


def program(start=0, limit=10, step=1, direction="LT", compared="%j, %limit", noted=""):
    values = dict(start=start, limit=limit, step=step, direction=direction, compared=compared)
    return parse(PROGRAM.format(**values, noted=noted))


def trips(module):
    entry = module.computations[module.entry]
    return trip_count(module, entry, entry.by_name["loop"])


@pytest.mark.parametrize(
    "expected, options",
    [
        (10, {}),
        (7, {"start": 3}),
        (4, {"step": 3}),
        (11, {"direction": "LE"}),
        (10, {"direction": "NE"}),
        (10, {"direction": "GT", "compared": "%limit, %j"}),
        (5, {"start": 9, "limit": 4, "step": -1, "direction": "GT"}),
        (6, {"start": 9, "limit": 4, "step": -1, "direction": "GE"}),
        (0, {"start": 12}),
        (17, {"noted": ', backend_config={"known_trip_count":{"n":"17"}}'}),
    ],
)
def test_trip_count(expected, options):
    assert trips(program(**options)) == expected


def test_a_limit_that_is_not_a_constant_leaves_the_length_open():
    text = PROGRAM.format(
        start=0, limit=10, step=1, direction="LT", compared="%j, %limit", noted=""
    )
    unknown = parse(text.replace("%limit = s32[] constant(10)", "%limit = s32[] negate(%j)"))
    assert trips(unknown) is None
    (negated,) = [step for step in steps(unknown) if step.instruction.name == "y"]
    assert (negated.times, negated.loop) == (1, "loop")


def test_a_limit_in_the_state_counts_while_the_body_leaves_it():
    text = """\
HloModule example
%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] fusion(%i, %one), kind=kLoop, calls=%plus
  ROOT %out = (s32[], s32[]) tuple(%next, %KEPT)
}
%plus (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%a, %b)
}
%below (a.1: s32[], b.1: s32[]) -> pred[] {
  %a.1 = s32[] parameter(0)
  %b.1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%a.1, %b.1), direction=LT
}
%condition (q: (s32[], s32[])) -> pred[] {
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  ROOT %test = pred[] fusion(%j, %m), kind=kLoop, calls=%below
}
ENTRY %main () -> (s32[], s32[]) {
  %zero = s32[] constant(2)
  %six = s32[] constant(6)
  %init = (s32[], s32[]) tuple(%zero, %six)
  ROOT %loop = (s32[], s32[]) while(%init), condition=%condition, body=%body
}
"""
    assert trips(parse(text.replace("%KEPT", "%n"))) == 4
    assert trips(parse(text.replace("%KEPT", "%next"))) is None


def test_instructions_are_read():
    module = program()
    body = module.computations["body"]
    (array,) = body.by_name["x"].arrays
    assert (array.dtype, array.dims, array.bytes) == ("f32", (4,), 16)
    assert [a.space for a in body.by_name["p"].arrays] == [0, 1]
    assert body.by_name["next"].operands == ("i", "step")
    assert body.by_name["y"].op_name == "jit(f)/while/body/neg"
    assert body.root.name == "out"
    (negated,) = [step for step in steps(module) if step.instruction.name == "y"]
    assert (negated.times, negated.loop) == (10, "")


def test_an_attribute_may_hold_line_breaks():
    """Kernels carry metadata that is printed as it is."""
    text = PROGRAM.format(
        start=0, limit=10, step=1, direction="LT", compared="%j, %limit", noted=""
    ).replace(
        'metadata={op_name="jit(f)/while/body/neg"}',
        'frontend_attributes={kernel={\n"q":"{1}"\n}}, metadata={op_name="kernel"}',
    )
    module = parse(text)
    assert module.computations["body"].root.name == "out"
    assert module.computations["body"].by_name["y"].op_name == "kernel"


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule nothing\n")
