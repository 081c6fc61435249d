"""Parses the text of a compiled program into computations and instructions.

XLA prints optimised modules in the same format for every backend; `jax.stages.Compiled.as_text` is
the public interface to this text. Only the parts that the other files need are parsed: shapes,
operands, attributes and called computations.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

BYTES = {
    "pred": 1, "token": 0, "opaque": 0,
    "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5,
    "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "f8e4m3": 1,
}  # fmt: skip

_ARRAY = re.compile(r"([a-z]\w*)\[([0-9,<= ]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype, shape and memory space of one array.

    Attributes:
      dtype: XLA's name for the dtype, such as "bf16", "s32" or "pred".
      dims: sizes.
      space: memory space of the layout: 0 is main memory (HBM), 1 is on-chip, 5 is the host.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Number of bytes, without the padding that a tiled layout may add."""
        return math.ceil(self.size * BYTES[self.dtype])

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: name and opcode, as printed.
      arrays: the result; several arrays if it is a tuple.
      operands: names of other instructions in the same computation.
      arguments: the text between the parentheses (the value of a constant, the index of a
        parameter).
      attributes: the text after the operands.
      root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Path of the named scopes and JAX primitives that it came from; "" if missing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def chain(self) -> tuple[str, str] | None:
        """Identity of a collective that libtpu splits over several fusions, to overlap it."""
        found = _CHAIN.search(self.attributes)
        return found.groups() if found else None

    def attribute(self, name: str) -> str:
        """Returns the text of an attribute, up to the next comma outside brackets; "" if absent."""
        found = re.search(rf"(?:^|, ){name}=", self.attributes)
        if not found:
            return ""
        start = found.end()
        return self.attributes[start : _closing(self.attributes, start, ",")]

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, in textual order."""
        if self.opcode == "conditional":
            names: list[str] = []
            for many, one in _BRANCHES.findall(self.attributes):
                names += _OPERAND.findall(many) if many else [one]
            return tuple(names)
        return tuple(_CALLED.findall(self.attributes.partition("metadata=")[0]))


@dataclasses.dataclass(frozen=True)
class Computation:
    """A sequence of instructions, in execution order."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(each for each in self.instructions if each.root)

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.by_name[instruction.operands[index]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program, as one device runs it."""

    computations: dict[str, Computation]
    entry: str

    def body(self, instruction: Instruction) -> Computation:
        """Returns the computation inside a fusion."""
        return self.computations[instruction.called[0]]

    def loop(self, instruction: Instruction) -> tuple[Computation, Computation]:
        """Returns the condition and the body of a `while`."""
        condition, body = (
            re.search(rf"{key}=%?([\w.\-]+)", instruction.attributes)[1]
            for key in ("condition", "body")
        )
        return self.computations[condition], self.computations[body]


def parse(text: str) -> Module:
    """Parses the output of `Compiled.as_text`.

    Raises:
      ValueError: if the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif name and (line == "}" or line.startswith("}, execution_thread")):
            found = map(_INSTRUCTION.match, lines)
            computations[name] = Computation(name, tuple(_instruction(x) for x in found if x))
            name = ""
        elif name and _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # attributes of kernels may contain line breaks
            lines[-1] += line
    if not entry:
        raise ValueError("the program's text has no ENTRY computation; pass compiled HLO")
    return Module(computations, entry)


def _instruction(found: re.Match[str]) -> Instruction:
    root, name, rest = bool(found[1]), found[2], re.sub(r"/\*index=\d+\*/", "", found[3])
    end = _closing(rest, 0, " ")
    kind, rest = rest[:end], rest[end + 1 :]
    opcode, _, rest = rest.partition("(")
    end = _closing(rest, 0, ")")
    arguments, attributes = rest[:end], rest[end + 1 :]
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        arrays=tuple(_arrays(kind)),
        operands=tuple(_OPERAND.findall(arguments)),
        arguments=arguments,
        attributes=attributes.removeprefix(", "),
        root=root,
    )


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.replace("<=", "")) for d in dims.split(",") if d.strip())
        yield Array(dtype, sizes, int(space[1]) if space else 0)


def _closing(text: str, start: int, end: str) -> int:
    """Returns the next position of `end` outside brackets and quotes, or the length of the text."""
    depth, quoted = 0, False
    for i in range(start, len(text)):
        c = text[i]
        if c == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif depth == 0 and c == end:
            return i
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
    return len(text)
