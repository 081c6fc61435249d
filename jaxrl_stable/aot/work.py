"""FLOPs and main-memory bytes of a compiled program on one chip.

XLA's own cost analysis counts the body of a loop once, which for a scan over layers is too low by a
factor of the number of layers; here loops are multiplied out. Only matrix products count (on TPU,
all of them are convolutions). As in XLA, each multiplication that does not involve padding counts
as two FLOPs. A kernel counts with the FLOPs that its authors declared (`cost_estimate`). Kernels
without a declaration are listed by name, because their work is missing from the sum. `kernel_flops`
has better figures for two kernels: a grouped product has a buffer sized for the worst case and
declares the FLOPs for a full one, but skips the empty part; splash attention declares nothing.

Bytes of main memory are a rough upper bound: what each instruction reads and writes if the chip
keeps nothing between instructions, except what the compiler placed in on-chip memory. A kernel's
operands count once and in full.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from jaxrl_stable.aot.hlo import Array, Computation, Instruction, Module
from jaxrl_stable.aot.loops import Step, steps
from jaxrl_stable.model.config import ModelConfig

# These move nothing: views, names, and the ends of operations that are counted at their start.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain",
    "call-start", "call-done", "async-start", "async-update", "async-done", "copy-done",
    "all-gather-done", "all-reduce-done", "collective-permute-done", "send-done", "recv-done",
    "recv", "iota",
)  # fmt: skip
_SILENT_KERNELS = ("AllocateBuffer", "PrepareAsync", "AssumeGather", "GatherScatterIndices")

KernelFlops = Callable[[Computation, Instruction], float | None]


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one chip in one run of a program, or in one iteration of a loop.

    Attributes:
      flops: FLOPs of matrix products and of kernels that declare theirs.
      hbm_bytes: bytes read from and written to main memory.
      unknown: names of the kernels without a declaration.
    """

    flops: float
    hbm_bytes: float
    unknown: tuple[str, ...]


def work(module: Module, loop: str = "", kernel_flops: KernelFlops | None = None) -> Work:
    """Adds up the work of a program.

    Args:
      module: the program.
      loop: name of a loop of unknown length, to count one iteration of it; "" counts everything
        outside such loops.
      kernel_flops: returns a better figure for a kernel, or None to use its declaration.
    """
    flops, moved, unknown, chains = 0.0, 0.0, set(), set()
    for step in steps(module):
        if step.loop != loop:
            continue
        if step.instruction.opcode == "custom-call":
            declared = _kernel(step, kernel_flops)
            if declared is None:
                unknown.add(step.instruction.op_name or step.instruction.name)
            flops += (declared or 0.0) * step.times
        else:
            flops += _flops(module, step.computation, step.instruction) * step.times
        moved += _moved(module, step.computation, step.instruction) * step.times
        for body, each in _carried(module, step.instruction):
            if each.chain not in chains:
                chains.add(each.chain)
                moved += _moved(module, body, each) * step.times
    return Work(flops, moved, tuple(sorted(unknown)))


def _kernel(step: Step, better: KernelFlops | None) -> float | None:
    attributes = step.instruction.attributes
    if better is not None:
        known = better(step.computation, step.instruction)
        if known is not None:
            return known
    declared = re.search(r'"cost_estimate":\{"flops":"?(\d+)', attributes)
    if declared:
        return float(declared[1])
    if 'custom_call_target="tpu_custom_call"' in attributes:
        return None
    return 0.0


def _flops(module: Module, computation: Computation, each: Instruction) -> float:
    if each.opcode == "fusion":
        body = module.body(each)
        return sum(_flops(module, body, inner) for inner in body.instructions)
    if each.opcode == "dot":
        left = computation.operand(each, 0).arrays[0].dims
        summed = _dimensions(each.attribute("lhs_contracting_dims"))
        return 2.0 * each.arrays[0].size * math.prod(left[d] for d in summed)
    if each.opcode == "convolution":
        return _convolution_flops(computation, each)
    return 0.0


def _convolution_flops(computation: Computation, each: Instruction) -> float:
    """Returns the FLOPs as XLA's `HloCostAnalysis::HandleConvolution` counts them.

    A batched product is a convolution over the batch whose dilated window covers one element at a
    time. Therefore only window positions that cover an element count.
    """
    left, right = (computation.operand(each, i).arrays[0].dims for i in (0, 1))
    out = each.arrays[0].dims
    lhs, rhs, result = re.split(r"_|->", each.attribute("dim_labels"))
    window = _window(each.attribute("window"), len(lhs) - 2)
    spatial = [label for label in lhs if label.isdigit()]
    flops = 2.0 * math.prod(out) * right[rhs.index("i")]
    for label, sizes in zip(sorted(spatial), window, strict=True):
        length, width = left[lhs.index(label)], out[result.index(label)]
        place = np.arange(width)[:, None] * sizes["stride"] - sizes["pad"]
        place = place + np.arange(sizes["size"])[None] * sizes["rhs_dilate"]
        inside = (place >= 0) & (place <= (length - 1) * sizes["lhs_dilate"])
        flops *= int((inside & (place % sizes["lhs_dilate"] == 0)).sum()) / width
    groups = int(each.attribute("batch_group_count") or 1)
    return flops / groups


def _window(text: str, spatial: int) -> list[dict[str, int]]:
    """Parses `{size=8x1 stride=7x1 pad=0_0x1_1 lhs_dilate=8x1}` into one dict per dimension."""
    found = dict(re.findall(r"(\w+)=([\w\-]+)", text))
    fields = {name: found[name].split("x") for name in found}
    one = ["1"] * spatial
    return [
        {
            "size": int(fields.get("size", one)[d]),
            "stride": int(fields.get("stride", one)[d]),
            "lhs_dilate": int(fields.get("lhs_dilate", one)[d]),
            "rhs_dilate": int(fields.get("rhs_dilate", one)[d]),
            "pad": int(fields["pad"][d].split("_")[0]) if "pad" in fields else 0,
        }
        for d in range(spatial)
    ]


def _dimensions(text: str) -> list[int]:
    return [int(d) for d in re.findall(r"\d+", text)]


def _moved(module: Module, computation: Computation, each: Instruction) -> float:
    """Returns the bytes moved between main memory and the chip: operands in, results out.

    A slice counts twice (read and written), without the array that it is cut from; so does an
    in-place update.
    """
    if each.opcode in _FREE or (
        each.opcode == "custom-call" and any(name in each.attributes for name in _SILENT_KERNELS)
    ):
        return 0.0
    operands = [computation.by_name[name] for name in each.operands]
    if each.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _in_main_memory(each)
    if each.opcode in ("dynamic-update-slice", "scatter"):
        return 2.0 * _in_main_memory(operands[1 if each.opcode == "dynamic-update-slice" else -1])
    if each.opcode == "copy-start":  # (target, source, handle)
        return sum(array.bytes for array in each.arrays[:2] if array.space == 0)
    if each.opcode == "fusion":
        return _moved_by_fusion(module, each, operands)
    if each.opcode.endswith("-start"):  # the result includes the operands
        return float(_in_main_memory(each))
    return float(sum(map(_in_main_memory, operands)) + _in_main_memory(each))


def _moved_by_fusion(module: Module, each: Instruction, operands: list[Instruction]) -> float:
    total, body = 0.0, module.body(each)
    carried = {a.dims for inside, x in _carried(module, each) for a in _touched(inside, x)}
    for index, operand in enumerate(operands):
        if operand.arrays[0].dims in carried:
            continue
        whole = _in_main_memory(operand)
        total += min(whole, _read_of(module, body, index)) if whole else 0.0
    updates = [x for x in body.instructions if x.opcode == "dynamic-update-slice"]
    updated = {x.arrays[0].dims: body.operand(x, 1).bytes for x in updates}
    for array in each.arrays:
        if array.space == 0 and array.dims not in carried:
            total += updated.get(array.dims, array.bytes)
    return total


def _read_of(module: Module, body: Computation, index: int) -> float:
    """Returns the bytes read from a fusion's operand: its slices only, if nothing else is used."""
    (parameter,) = (
        each
        for each in body.instructions
        if each.opcode == "parameter" and int(each.arguments) == index
    )
    total, names = 0.0, [parameter.name]
    while names:
        name = names.pop()
        for user in body.instructions:
            if name not in user.operands:
                continue
            from_it = user.operands[0] == name
            if _is_view(module, user) and not user.root:
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and from_it:
                total += user.bytes
            elif user.opcode == "fusion":
                total += _read_of(module, module.body(user), user.operands.index(name))
            elif user.opcode != "dynamic-update-slice" or not from_it:
                return float(parameter.bytes)  # an array updated in place is not read
    return total


def _carried(module: Module, fusion: Instruction) -> list[tuple[Computation, Instruction]]:
    """Returns the collectives that overlap with a fusion, each with its computation."""
    if fusion.opcode != "fusion":
        return []
    body, found = module.body(fusion), []
    for each in body.instructions:
        found += _carried(module, each) + [(body, each)] * (each.chain is not None)
    return found


def _touched(computation: Computation, each: Instruction) -> tuple[Array, ...]:
    operands = (computation.by_name[name] for name in each.operands)
    return (*each.arrays, *(array for operand in operands for array in operand.arrays))


def _is_view(module: Module, each: Instruction) -> bool:
    """Returns whether it only changes layout or dtype, which moves no bytes inside a fusion."""
    if each.opcode == "fusion":
        body = module.body(each).instructions
        return all(x.opcode == "parameter" or _is_view(module, x) for x in body)
    return each.opcode in ("bitcast", "copy", "convert", "reshape")


def _in_main_memory(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.space == 0)


# Matrix products per head. Forward: scores, and scores times values. Backward: the scores again,
# then the gradients of scores, values, keys and, in the fused kernel, queries.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(config: ModelConfig) -> KernelFlops:
    """Returns a function that counts the FLOPs of grouped products and attention in programs.

    A grouped product counts the rows that it gets if routers spread tokens evenly: with K choices
    among E experts, each of the e experts on a chip gets K/E of the tokens, and the chip's buffer
    has room for min(K, e) rows per token. Attention counts half of the (query, key) pairs, because
    splash skips blocks above the diagonal.
    """

    def flops(computation: Computation, kernel: Instruction) -> float | None:
        if "ragged-dot-metadata" in kernel.name or "ragged-dot-metadata" in kernel.op_name:
            return 0.0  # computes where each group begins
        if "ragged" in kernel.name or re.search("ragged_dot|tgmm", kernel.op_name):
            return _grouped(computation, kernel, config)
        splash = re.search(r"splash_mha_(fwd|dq|dkv)", kernel.op_name or kernel.name)
        if splash:
            return _splash(computation, kernel, splash[1])
        return None

    return flops


def _grouped(computation: Computation, kernel: Instruction, config: ModelConfig) -> float | None:
    """Returns 2 · rows · D · F, read from the weights `[e, D, F]` or their gradient."""
    arrays = [a for name in kernel.operands for a in computation.by_name[name].arrays]
    weights = [a for a in (*arrays, *kernel.arrays) if len(a.dims) == 3]
    if not weights:
        return None
    here, *matrix = weights[0].dims
    room = max(a.dims[0] for a in arrays if len(a.dims) == 2)
    chosen = config.num_experts_per_token
    rows = room * chosen * here / (config.num_experts * min(chosen, here))
    return 2.0 * rows * math.prod(matrix)


def _splash(computation: Computation, kernel: Instruction, kind: str) -> float:
    """Reads sizes from the first two operands, queries `[…, H, T, hd]` and keys `[…, G, S, hd]`."""
    arrays = [a for name in kernel.operands for a in computation.by_name[name].arrays]
    queries, keys = [a for a in arrays if a.dtype in ("bf16", "f32") and len(a.dims) > 2][:2]
    gradients = [a for a in kernel.arrays if a.dtype == queries.dtype and len(a.dims) > 2]
    fused = kind == "dkv" and len(gradients) == 3
    products = _SPLASH_PRODUCTS[kind] + fused
    return 2.0 * products * queries.size * keys.dims[-2] / 2
