"""The printed table of figures, and advice on programs that do not fit."""

from __future__ import annotations

from jaxrl_stable.aot.analysis import Figures, Part
from jaxrl_stable.aot.memory import Tensor
from jaxrl_stable.text import aligned, byte_size, duration

_HEADERS = (
    "program",
    "compile",
    "arguments",
    "temporary",
    "peak",
    "in all",
    "of HBM",
    "TFLOP",
    "model",
    "HBM bytes",
    "sent",
    "bound",
    "time",
    "MFU",
)


def table(figures: list[Figures]) -> str:
    """Returns a table with one line per program and loop; every figure is per chip."""
    rows = [_HEADERS]
    for each in figures:
        for part in each.parts:
            rows.append(_row(each, part))
    return aligned(rows)


def details(figures: list[Figures]) -> str:
    """Lists the bytes that one chip sends, by kind, and the kernels whose FLOPs are missing."""
    lines = []
    for part in (part for each in figures for part in each.parts):
        if part.sent:
            kinds = ", ".join(f"{kind} {byte_size(n)}" for kind, n in part.sent.items())
            lines.append(f"{part.name}: {kinds}")
        if part.unknown:
            lines.append(f"{part.name}: without the FLOPs of {', '.join(part.unknown)}")
    return "\n".join(lines)


def refusal(each: Figures) -> str:
    """Returns one line: why a program does not fit, its largest tensors, and what to change."""
    memory = each.memory
    largest = max(each.tensors, key=lambda tensor: tensor.bytes)
    others = [str(tensor) for tensor in each.tensors[1:3]]
    return (
        f"{each.name} needs {byte_size(memory.total)} on each chip, which has "
        f"{byte_size(each.hbm)} ({byte_size(memory.arguments)} arguments, "
        f"{byte_size(memory.temporaries)} temporaries, "
        f"{byte_size(memory.resident)} held outside the program); the largest is the "
        f"{largest.kind} {largest}, then {', '.join(others)}; {advice(largest)}"
    )


def advice(tensor: Tensor) -> str:
    """Returns advice on how to make a tensor smaller."""
    if tensor.kind == "temporary":
        return (
            "use a smaller Reinforcement.micro_batch_size (a divisor that the mesh still divides), "
            "ModelConfig.remat = 'block' or 'offload', smaller ModelConfig.experts_rows or "
            "head_chunk, Reinforcement.rollout_rows, MeshShape.context, or a larger slice"
        )
    name = tensor.name
    if "keys" in name or "values" in name or "routing" in name or "batch" in name:
        return "use fewer Reinforcement.prompts, a smaller max_tokens, or a larger slice"
    if "every chip" in tensor.spread:
        return "spread it: MeshShape.fsdp, or an axis that divides its sizes"
    return "use a larger MeshShape.fsdp or expert, ModelConfig.param_dtype, or a larger slice"


def _row(each: Figures, part: Part) -> tuple[str, ...]:
    first = part is each.parts[0]
    memory = each.memory
    of_program = (
        f"{each.seconds:.1f} s",
        byte_size(memory.arguments),
        byte_size(memory.temporaries),
        byte_size(memory.peak),
        byte_size(memory.total),
        f"{memory.total / each.hbm:.0%}",
    )
    return (
        each.name if first else f"  {part.name}, per token",
        *(of_program if first else ("",) * len(of_program)),
        f"{part.flops / 1e12:.3g}",
        f"{part.model_flops / 1e12:.3g}",
        byte_size(part.hbm_bytes),
        byte_size(sum(part.sent.values())),
        part.times.bound,
        duration(part.times.step),
        f"{part.mfu:.0%}" if part.model_flops else "",
    )
