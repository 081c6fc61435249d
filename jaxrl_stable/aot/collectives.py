"""The collectives of a compiled program, their groups, and the bytes that a chip sends.

Bytes are counted as they leave one chip if the collective runs as a ring of n chips, which is the
convention of NCCL's "bus bandwidth" and of the JAX scaling book:

    all-gather           (n − 1) · input                    = (n − 1)/n · output
    reduce-scatter       (n − 1)/n · input
    all-reduce           2 (n − 1)/n · input                (a reduce-scatter, then an all-gather)
    all-to-all           (n − 1)/n · input
    ragged-all-to-all    (n − 1)/n · the smaller buffer     (contents are known only at run time)
    collective-permute   input

libtpu writes some reduce-scatters as an all-reduce fused with the slice that a chip keeps. These
are counted as reduce-scatters. If the slice is taken outside the fusion, the all-reduce counts as
an all-reduce.

A collective counts once per run of its instruction, with loops multiplied out. Chips in one slice
communicate over ICI. Between slices, the TPU compiler replaces a collective with a send through the
host, labelled with the collective's kind; these bytes go over the data-centre network (DCN).
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from jaxrl_stable.aot.groups import replica_groups
from jaxrl_stable.aot.hlo import Array, Computation, Instruction, Module
from jaxrl_stable.aot.loops import steps

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_DCN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      network: "ici" or "dcn".
      arrays: the operands, on one chip.
      group: devices of the first group; empty over DCN.
      size: chips (over DCN: slices) per group.
      sent: bytes that leave a chip per run.
      times: number of runs, in total or per iteration of `loop`.
      loop: the enclosing loop of unknown length; "" outside such loops.
      op_name: its origin in the Python program.
      gathers: whether it is an all-reduce that gathers parts: each chip writes its own part into
        zeros, and the results are summed. XLA for TPU writes an all-gather this way if it has
        nothing faster for these links.
    """

    kind: str
    network: str
    arrays: tuple[Array, ...]
    group: tuple[int, ...]
    size: int
    sent: int | float
    times: int
    loop: str
    op_name: str
    gathers: bool = False


def collectives(module: Module, devices: int, slices: int = 1) -> list[Collective]:
    """Returns all collectives that a program runs.

    Args:
      module: the program.
      devices: chips per slice.
      slices: number of slices.

    Raises:
      ValueError: if replica groups have an unknown form.
    """
    found, chains = [], set()
    for step in steps(module):
        for computation, each in _with_fused(module, step.computation, step.instruction):
            if each.chain in chains:
                continue
            chains |= {each.chain} - {None}
            collective = _read(module, computation, each, devices, slices)
            if collective:
                times = dict(times=step.times, loop=step.loop)
                found.append(dataclasses.replace(collective, **times))
    return found


def bytes_by_kind(found: Iterable[Collective], loop: str = "") -> dict[str, int | float]:
    """Returns the bytes that a chip sends, by "kind" over ICI and "dcn kind" over DCN.

    Args:
      found: collectives.
      loop: name of a loop of unknown length, to count one iteration of it; "" counts everything
        outside such loops.
    """
    total: dict[str, int | float] = defaultdict(float)
    for each in found:
        if each.loop == loop and each.sent:
            name = each.kind if each.network == "ici" else f"dcn {each.kind}"
            total[name] += each.sent * each.times
    return dict(sorted(total.items()))


def spanned_axes(group: Sequence[int], coordinates: Sequence[Sequence[int]]) -> int:
    """Returns the number of torus dimensions along which the chips of a group differ."""
    places = np.array([coordinates[device] for device in group])
    return int((places != places[0]).any(0).sum())


def _with_fused(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[Computation, Instruction]]:
    """Returns the instruction or, for a fusion, the instructions inside it."""
    if instruction.opcode != "fusion":
        return [(computation, instruction)]
    body = module.body(instruction)
    return [pair for each in body.instructions for pair in _with_fused(module, body, each)]


def _read(
    module: Module, computation: Computation, each: Instruction, devices: int, slices: int
) -> Collective | None:
    common = dict(times=1, loop="", op_name=each.op_name)
    if each.opcode == "send" and (sent_over_dcn := _DCN.search(each.attributes)):
        kind = sent_over_dcn[1].lower().replace("_", "-")
        arrays = computation.operand(each, 0).arrays
        sent = _sent(kind, slices, sum(a.bytes for a in arrays))
        return Collective(kind, "dcn", arrays, (), slices, sent, **common)
    kind = each.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    operands = [computation.by_name[name] for name in each.operands]
    if kind == "ragged-all-to-all":  # input and output buffers, then offsets and sizes
        operands = [min(operands[:2], key=lambda x: x.bytes)]
    arrays = tuple(array for operand in operands for array in operand.arrays)
    payload = sum(array.bytes for array in arrays)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", each.attributes)
        moves = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
        moving = [(int(a), int(b)) for a, b in moves if a != b]
        group = moving[0] if moving else (0,)
        return Collective(kind, "ici", arrays, group, len(group), payload * bool(moving), **common)
    groups = replica_groups(each.attributes, devices)
    size = groups.shape[1]
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
        kind = "reduce-scatter"  # libtpu fuses it with the slice of the sum that a chip keeps
    gathers = kind == "all-reduce" and any(_placed(module, computation, x) for x in operands)
    sent = _sent(kind, size, payload)
    return Collective(
        kind, "ici", arrays, tuple(groups[0].tolist()), size, sent, gathers=gathers, **common
    )


def _sent(kind: str, n: int, payload: int) -> int | float:
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    return factor.get(kind, (n - 1) / n) * payload if n > 1 else 0.0


def _placed(module: Module, computation: Computation, value: Instruction) -> bool:
    """Returns whether a value is a part that was written into an array of zeros."""
    while value.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        value = computation.operand(value, 0)
    if value.opcode == "fusion":
        body = module.body(value)
        return _placed(module, body, body.root)
    if value.opcode != "dynamic-update-slice":
        return False
    into = computation.operand(value, 0)
    while into.opcode in ("copy", "bitcast"):
        into = computation.operand(into, 0)
    if into.opcode == "parameter":  # the parameter of a fusion; its operand holds the zeros
        return True
    return into.opcode == "broadcast"
