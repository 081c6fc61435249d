"""Memory that a program needs on one chip, and its largest tensors.

`programs.py` compiles the programs for a slice from `topology.py`; no TPU is needed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from jaxrl_stable.aot.hlo import Module
from jaxrl_stable.aot.loops import steps

_VIEWS = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "constant")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      arguments, temporaries, outputs: bytes that the compiler laid out in main memory.
      donated: the part of the arguments whose memory outputs reuse.
      peak: the most that the program holds at once, according to the compiler's simulation.
      resident: bytes that the run holds outside the program, such as the optimizer's moments during
        a rollout.
    """

    arguments: int
    temporaries: int
    outputs: int
    donated: int
    peak: int
    resident: int

    @property
    def total(self) -> int:
        """The memory that a chip needs: all that is laid out, even if the peak is lower."""
        return self.arguments + self.temporaries + self.outputs - self.donated + self.resident


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that takes memory.

    Attributes:
      name: path of an argument, or the operation that produces a temporary.
      kind: "argument", "resident" (see `Memory`) or "temporary".
      shape: dtype and sizes, of one chip's part for temporaries and else of the whole array.
      spread: how it is spread over the mesh; "" for temporaries.
      bytes: bytes on one chip.
    """

    name: str
    kind: str
    shape: str
    spread: str
    bytes: int

    def __str__(self) -> str:
        spread = f" {self.spread}" if self.spread else ""
        return f"{self.name} {self.shape}{spread}: {self.bytes / 2**30:.2f} GiB"


def memory(executable: jax.stages.Compiled, resident: Any) -> Memory:
    """Reads the compiler's memory analysis."""
    stats = executable.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        donated=stats.alias_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
        resident=chip_bytes(resident),
    )


def chip_bytes(tree: Any) -> int:
    """Returns the number of bytes that one chip holds of a tree of abstract, sharded arrays."""
    return sum(map(_part_bytes, jax.tree.leaves(tree)))


def named_tensors(tree: dict[str, Any], kind: str) -> Iterator[Tensor]:
    """Yields the arrays in a tree, named by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in leaves:
        dims = ",".join(map(str, leaf.shape))
        spread = tuple(leaf.sharding.spec)
        yield Tensor(
            name=_path(path),
            kind=kind,
            shape=f"{leaf.dtype.name}[{dims}]",
            spread=f"over {_spec(spread)}" if any(spread) else "on every chip",
            bytes=_part_bytes(leaf),
        )


def temporaries(module: Module) -> Iterator[Tensor]:
    """Yields the results of instructions in main memory, once per operation and shape.

    They are not all alive at the same time; look at the largest ones first.
    """
    seen = set()
    for step in steps(module):
        each = step.instruction
        if each.opcode in _VIEWS or each.opcode.endswith("-done"):
            continue
        for array in each.arrays:
            key = (str(array), each.op_name)
            if array.space == 0 and key not in seen:
                seen.add(key)
                name = re.sub(r"^jit\((\w+)\)", r"\1", each.op_name).replace("closed_call/", "")
                yield Tensor(name or each.name, "temporary", str(array), "", array.bytes)


def _part_bytes(leaf: Any) -> int:
    part = leaf.sharding.shard_shape(leaf.shape)
    itemsize = leaf.dtype.itemsize
    return math.prod(part) * itemsize


def _spec(entries: tuple) -> str:
    axes = ["×".join(e) if isinstance(e, tuple) else str(e or "–") for e in entries]
    return f"({', '.join(axes)})"


def _path(path: tuple) -> str:
    names = []
    for key in path:
        name = getattr(key, "name", None) or getattr(key, "key", None)
        if name is None:
            name = getattr(key, "idx", "")
        if name != "value" and not isinstance(key, nnx.Variable):
            names.append(str(name))
    return ".".join(filter(None, names))
