"""All figures on one compiled program, to print, store and compare."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

from jaxrl_stable.aot import hlo
from jaxrl_stable.aot.collectives import Collective, bytes_by_kind, collectives
from jaxrl_stable.aot.loops import steps
from jaxrl_stable.aot.memory import Memory, Tensor, memory, named_tensors, temporaries
from jaxrl_stable.aot.programs import Compiled
from jaxrl_stable.aot.roofline import Roofline, roofline
from jaxrl_stable.aot.topology import Topology
from jaxrl_stable.aot.work import kernel_flops, work
from jaxrl_stable.configs import Reinforcement
from jaxrl_stable.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """Figures per chip for the part that runs once, or for one iteration of the decode loop.

    Attributes:
      name: the program, or "decode" for one decode step of the rows that are sampled together.
      flops: FLOPs that the program computes, in products and kernels.
      model_flops: FLOPs that the model needs.
      hbm_bytes: bytes read from and written to main memory.
      sent: bytes sent, by kind of collective; "dcn …" between slices.
      times: seconds that each resource needs.
      mfu: upper bound on model FLOPs utilisation.
      unknown: kernels whose FLOPs are missing from `flops`.
    """

    name: str
    flops: int | float
    model_flops: int | float
    hbm_bytes: int | float
    sent: dict[str, int | float]
    times: Roofline
    mfu: float
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures on one program on one topology.

    Attributes:
      name: the program.
      seconds: compilation time.
      memory: memory on one chip.
      hbm: bytes of main memory that programs can use on one chip.
      parts: the part that runs once and, if present, the loop over tokens.
      tensors: the tensors that take the most memory, largest first.
    """

    name: str
    seconds: float
    memory: Memory
    hbm: int | float
    parts: tuple[Part, ...]
    tensors: tuple[Tensor, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.hbm

    def record(self) -> dict[str, Any]:
        """Returns the figures as a JSON object."""
        record = dataclasses.asdict(self) | {"fits": self.fits}
        record["memory"]["total"] = self.memory.total
        for part, stored in zip(self.parts, record["parts"], strict=True):
            stored |= {"bound": part.times.bound, "seconds": part.times.step}
        return record


def analyse(
    compiled: Compiled, config: ModelConfig, topology: Topology, mesh: Mesh, tensors: int = 5
) -> Figures:
    """Measures a compiled program.

    Args:
      compiled: the program.
      config: model configuration.
      topology: the topology that the program was compiled for.
      mesh: the mesh over the devices of the topology.
      tensors: number of largest tensors to keep.
    """
    program = compiled.program
    module = hlo.parse(compiled.executable.as_text())
    found = collectives(module, topology.slice_size, topology.slices)
    coordinates = [device.coords for device in mesh.devices.flat][: topology.slice_size]

    def part(name: str, loop: str, model_flops: float) -> Part:
        done = work(module, loop, kernel_flops(config))
        inside: list[Collective] = [each for each in found if each.loop == loop]
        times = roofline(topology.chip, done.flops, done.hbm_bytes, inside, coordinates)
        useful = model_flops / topology.chips
        return Part(
            name=name,
            flops=done.flops,
            model_flops=useful,
            hbm_bytes=done.hbm_bytes,
            sent=bytes_by_kind(found, loop),
            times=times,
            mfu=times.mfu(useful, topology.chip),
            unknown=done.unknown,
        )

    parts = [part(program.name, "", program.model_flops)]
    loops = sorted({step.loop for step in steps(module)} - {""})
    parts += [part("decode", loop, program.loop_flops) for loop in loops]
    largest = [
        *named_tensors(program.arguments, "argument"),
        *named_tensors(program.resident, "resident"),
        *temporaries(module),
    ]
    largest.sort(key=lambda tensor: -tensor.bytes)
    return Figures(
        name=program.name,
        seconds=compiled.seconds,
        memory=memory(compiled.executable, program.resident),
        hbm=topology.chip.hbm,
        parts=tuple(parts),
        tensors=tuple(largest[:tensors]),
    )


def step_seconds(figures: list[Figures], rl: Reinforcement) -> dict[str, float]:
    """Returns seconds per training step at the roofline, by program, for full-length responses."""
    rows = rl.prompts * rl.group_size
    decoded = rl.max_tokens * rows // (rl.rollout_rows or rows)
    total = {}
    for each in figures:
        first, *loops = each.parts
        seconds = first.times.step + decoded * math.fsum(x.times.step for x in loops)
        runs = rl.objective.mini_batches if each.name == "update" else 1
        total[each.name] = runs * seconds
    return total
