"""Counts how often each instruction of a compiled program runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from jaxrl_stable.aot.hlo import Computation, Instruction, Module

# The same comparisons with swapped operands: the limit on the left, the counter on the right.
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}
_INCLUSIVE = {"LT": 0, "GT": 0, "NE": 0, "LE": 1, "GE": -1}
_COPIES = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")
_CALLS = ("call", "conditional", "async-start", "call-start")


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that runs, and how often.

    Attributes:
      instruction: the instruction; never one inside a fusion.
      computation: the computation that contains it.
      times: number of runs per run of the program, or per iteration of `loop`.
      loop: the innermost enclosing loop of unknown length; "" if all lengths are known.
    """

    instruction: Instruction
    computation: Computation
    times: int
    loop: str


def steps(module: Module) -> Iterator[Step]:
    """Yields all instructions that run, with loops multiplied out, except those inside fusions.

    Every branch of a conditional counts, which is an upper bound: only one of them runs.
    """
    yield from _steps(module, module.computations[module.entry], 1, "")


def _steps(module: Module, computation: Computation, times: int, loop: str) -> Iterator[Step]:
    for each in computation.instructions:
        yield Step(each, computation, times, loop)
        if each.opcode == "while":
            count = trip_count(module, computation, each)
            condition, body = module.loop(each)
            inside = (1, each.name) if count is None else (times * count, loop)
            yield from _steps(module, condition, *inside)
            yield from _steps(module, body, *inside)
        elif each.opcode in _CALLS:
            for name in each.called:
                yield from _steps(module, module.computations[name], times, loop)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns the number of iterations of a `while`, or None if the text does not determine it.

    Some backends record the number. Otherwise, the condition must compare a counter with a fixed
    limit, and the body must add a constant to that counter; start, limit and step must be
    constants.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (_Values(module, each) for each in module.loop(loop))
    start = _Values(module, computation).elements(loop.operands[0])
    test = condition.operation(condition.computation.root.name)
    if test is None or test.opcode != "compare" or test.direction not in _MIRRORED:
        return None
    left, right = test.operands
    for counter, limit, direction in (
        (left, right, test.direction),
        (right, left, _MIRRORED[test.direction]),
    ):
        if not isinstance(counter, _Element):
            continue
        first, step = start.get(counter.index), body.increment(counter.index)
        if isinstance(limit, _Element) and body.increment(limit.index) == 0:
            limit = start.get(limit.index)
        if step and isinstance(first, int) and isinstance(limit, int):
            return max(-(-(limit - first + _INCLUSIVE[direction]) // step), 0)
    return None


@dataclasses.dataclass(frozen=True)
class _Element:
    """An element of a loop's carried state."""

    index: int


@dataclasses.dataclass(frozen=True)
class _Operation:
    """An integer instruction, taken out of its fusion if it is inside one."""

    opcode: str
    direction: str
    operands: tuple[_Element | int | None, ...]


@dataclasses.dataclass(frozen=True)
class _Values:
    """The known integer values in one computation."""

    module: Module
    computation: Computation

    def origin(self, name: str) -> Instruction:
        """Returns the instruction that a value was copied from."""
        found = self.computation.by_name[name]
        while found.opcode in _COPIES:
            found = self.computation.by_name[found.operands[0]]
        return found

    def value(self, name: str) -> _Element | int | None:
        """Returns a constant or an element of the carried state; None for anything else."""
        found = self.origin(name)
        if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.arguments):
            return int(found.arguments)
        if found.opcode != "get-tuple-element":
            return None
        if self.origin(found.operands[0]).opcode != "parameter":
            return None
        return _Element(int(found.attribute("index")))

    def elements(self, name: str) -> dict[int, int]:
        """Returns the constants among the elements of a tuple."""
        found = self.origin(name)
        values = map(self.value, found.operands) if found.opcode == "tuple" else ()
        return {i: value for i, value in enumerate(values) if isinstance(value, int)}

    def operation(self, name: str) -> _Operation | None:
        """Returns the instruction that computes a value, with operands of this computation."""
        found = self.origin(name)
        if found.opcode != "fusion":
            operands = tuple(map(self.value, found.operands))
            return _Operation(found.opcode, found.attribute("direction"), operands)
        inside = _Values(self.module, self.module.body(found))
        root = inside.origin(inside.computation.root.name)

        def outside(name: str) -> _Element | int | None:
            origin = inside.origin(name)
            if origin.opcode == "parameter":
                return self.value(found.operands[int(origin.arguments)])
            return inside.value(name)

        operands = tuple(map(outside, root.operands))
        return _Operation(root.opcode, root.attribute("direction"), operands)

    def increment(self, index: int) -> int | None:
        """Returns the constant that an iteration adds to a state element; None if unknown."""
        root = self.origin(self.computation.root.name)
        if root.opcode != "tuple":
            return None
        element, name = _Element(index), root.operands[index]
        if self.value(name) == element:
            return 0
        found = self.operation(name)
        if found is None or found.opcode not in ("add", "subtract"):
            return None
        left, right = found.operands
        if found.opcode == "subtract":
            return -right if left == element and isinstance(right, int) else None
        if right == element:
            left, right = right, left
        return right if left == element and isinstance(right, int) else None
