"""The roofline: the shortest time that a chip allows (Williams, Waterman and Patterson 2009).

The time on each resource is its work divided by its speed. With perfect overlap, a step takes as
long as the slowest resource, called the bound. Real steps take longer: overlap is never perfect,
and small or ragged products do not reach the peak. The utilisation is therefore an upper bound,
unless HBM is the slowest resource: its bytes are a rough upper estimate (see `work`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from jaxrl_stable.aot.collectives import Collective, spanned_axes
from jaxrl_stable.aot.topology import Chip

RESOURCES = ("compute", "HBM", "ICI", "DCN")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one chip needs on each resource.

    Attributes:
      compute: FLOPs of the program, divided by the bfloat16 peak.
      hbm: bytes, divided by the bandwidth of main memory.
      ici: bytes of each collective, divided by the bandwidth of all links along the torus
        dimensions that its group spans (a permutation uses one link), summed over collectives.
      dcn: bytes sent between slices, divided by a chip's share of its host's network bandwidth.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> dict[str, float]:
        return dict(zip(RESOURCES, dataclasses.astuple(self), strict=True))

    @property
    def bound(self) -> str:
        return max(RESOURCES, key=self.seconds.__getitem__)

    @property
    def step(self) -> float:
        return max(self.seconds.values())

    def mfu(self, model_flops: float, chip: Chip) -> float:
        """Returns the share of the peak that useful work can reach.

        Args:
          model_flops: FLOPs that the model needs, per chip.
          chip: the chip.
        """
        return model_flops / (self.step * chip.flops) if self.step else 0.0


def roofline(
    chip: Chip,
    flops: float,
    hbm_bytes: float,
    found: Iterable[Collective],
    coordinates: Sequence[Sequence[int]],
) -> Roofline:
    """Returns the times of one run of a program, or of one iteration of a loop.

    Args:
      chip: the chip.
      flops: FLOPs that one chip computes.
      hbm_bytes: bytes that it reads and writes.
      found: the collectives.
      coordinates: position of each device in the torus.
    """
    ici, dcn = 0.0, 0.0
    for each in found:
        if not each.sent:
            continue
        if each.network == "dcn":
            dcn += each.times * each.sent / chip.dcn_bandwidth
            continue
        links = 1
        if each.kind != "collective-permute":
            links = 2 * max(spanned_axes(each.group, coordinates), 1)
        ici += each.times * each.sent / (links * chip.link_bandwidth)
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, ici, dcn)
