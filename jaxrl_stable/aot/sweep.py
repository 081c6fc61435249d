"""Weak scaling: the same work per chip on slices of several sizes.

`prompts`, `micro_batch_size` and the mesh axis `data` grow with the number of chips (`data` is −1
in the gin file, so it takes the devices that the other axes leave). What a chip holds and sends
should then stay constant; anything that grows limits the size of a run.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from jaxrl_stable.aot.analysis import Figures
from jaxrl_stable.aot.topology import Topology
from jaxrl_stable.configs import Experiment
from jaxrl_stable.text import aligned, byte_size, duration


def scaled(experiment: Experiment, factor: Fraction) -> Experiment:
    """Returns the experiment with `factor` times the rows, in the same number of micro-batches.

    Raises:
      ValueError: if the mesh has no axis that grows, or a number of rows would not be whole.
    """
    if experiment.mesh.data != -1:
        raise ValueError(
            f"--sweep needs MeshShape.data = -1, the axis that grows; it is {experiment.mesh.data}"
        )
    rl = experiment.reinforcement
    sizes = {name: getattr(rl, name) * factor for name in ("prompts", "micro_batch_size")}
    for name, value in sizes.items():
        if value.denominator != 1:
            raise ValueError(
                f"--sweep: Reinforcement.{name} is {getattr(rl, name)} on the first slice, "
                f"and would be {float(value):g} on another; begin with the smallest slice"
            )
    rl = dataclasses.replace(rl, **{name: int(value) for name, value in sizes.items()})
    return dataclasses.replace(experiment, reinforcement=rl)


Sizes = list[tuple[Topology, list[Figures]]]


def sweep_table(sizes: Sizes) -> str:
    """Returns a table of memory, bytes sent and time per chip, by program and number of chips."""
    chips = [str(topology.chips) for topology, _ in sizes]
    rows = [("per chip, by number of chips:", *chips, "last to first")]
    for label, values, text in _series(sizes):
        change = f"{values[-1] / values[0] - 1:+.1%}" if values[0] else ""
        rows.append((label, *map(text, values), change))
    return aligned(rows)


def sweep_record(sizes: Sizes) -> list[dict[str, Any]]:
    """Returns the figures on all topologies as a JSON array."""
    return [topology_record(topology, figures) for topology, figures in sizes]


def topology_record(topology: Topology, figures: list[Figures]) -> dict[str, Any]:
    """Returns the figures on one topology as a JSON object."""
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "programs": [each.record() for each in figures],
    }


def plot_sweep(sizes: Sizes, path: pathlib.Path) -> None:
    """Plots memory, bytes sent and time per chip against the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chips = [topology.chips for topology, _ in sizes]
    panels = {"memory": "memory [GiB]", "sent": "sent [GiB]", "time": "time at the roofline [s]"}
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    axes[0].axhline(sizes[0][0].chip.hbm / 2**30, color="grey", linestyle=":", label="HBM")
    for axis, (quantity, title) in zip(axes, panels.items(), strict=True):
        for label, values, _ in _series(sizes):
            name, _, kind = label.rpartition(": ")
            if kind == quantity:
                scale = 1.0 if quantity == "time" else 2.0**30
                axis.plot(chips, [value / scale for value in values], marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(chips, [str(n) for n in chips])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("chips")
        axis.set_title(f"{title} per chip")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _series(
    sizes: Sizes,
) -> Iterator[tuple[str, list[int | float], Callable[[int | float], str]]]:
    """Yields, for each line, its label, its value on each topology, and a formatter."""
    for programs in zip(*(figures for _, figures in sizes), strict=True):
        yield f"{programs[0].name}: memory", [each.memory.total for each in programs], byte_size
        for parts in zip(*(each.parts for each in programs), strict=True):
            name = parts[0].name
            yield f"{name}: sent", [math.fsum(part.sent.values()) for part in parts], byte_size
            yield f"{name}: time", [part.times.step for part in parts], duration
