"""TPU slices without TPUs: devices to compile for, from the compiler alone, and what they can do.

A topology is named as by Google Cloud, `v5e:16x16` or `v5p:4x4x4`: chips along each dimension of
the torus. `v5e:16x16*2` is two such slices, joined by the data-centre network (DCN).

Speeds and memory: the pages of Google Cloud, docs.cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e.
Links between chips (ICI, one way) and the network between slices: "How to Scale Your Model",
jax-ml.github.io/scaling-book/tpus, whose figures are a tenth below the nominal ones of those pages.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re

import jax

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: as in the name of a topology.
      hbm: bytes of main memory that a program may use. The compiler keeps the rest of the nominal
        16, 95 and 32 GB; this figure is from its own message when a program does not fit.
      flops: of dense bfloat16 products, a second.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second over one ICI link in one direction. A chip has two links for
        each dimension of the torus.
      dimensions: of the torus.
      dcn_bandwidth: bytes a second that a chip sends to other slices; its share of the host's.
    """

    name: str
    hbm: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    dcn_bandwidth: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * GiB, 197e12, 819e9, 4.5e10, 2, 3.125e9),
        Chip("v5p", 95.74 * GiB, 459e12, 2765e9, 9e10, 3, 6.25e9),
        Chip("v6e", 31.25 * GiB, 918e12, 1638e9, 9e10, 2, 12.5e9),
    )
}

# libtpu asks the cloud's metadata server and this host's environment what machine it is on, and
# complains where neither knows. Compiling needs none of it.
_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process dies on a lock file
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """What to compile for.

    Attributes:
      name: with the number of slices.
      chip: its figures.
      shape: chips along each dimension of one slice.
      slices: number of them.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def slice_size(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.slice_size * self.slices

    def devices(self) -> list[jax.Device]:
        """The devices, which can be compiled for and nothing else.

        Raises:
          ValueError: libtpu is not installed, or knows no such slice.
        """
        for name, value in _NO_MACHINE.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.chip.name}:{'x'.join(map(str, self.shape))}",
                num_slices=self.slices,
            )
        except Exception as error:
            if not has_libtpu():
                raise ValueError(
                    "compiling for TPUs needs libtpu; install the extra: "
                    "pip install 'jaxrl_stable[tpu]'"
                ) from error
            raise ValueError(f"--topology={self.name}: {error}") from error
        return list(found.devices)


def has_libtpu() -> bool:
    """Whether the compiler for TPUs is installed."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    return True


def parse_topology(name: str) -> Topology:
    """Reads `v5p:4x4x4` or `v5e:16x16*2`.

    Raises:
      ValueError: another form, an unknown chip, or a wrong number of dimensions.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"--topology={name!r} is not known; write chip:AxB or chip:AxBxC, with *N behind it "
            f"for N slices, where the chip is one of {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if len(shape) != chip.dimensions:
        raise ValueError(
            f"--topology={name!r} has {len(shape)} dimensions; slices of {chip.name} have "
            f"{chip.dimensions}"
        )
    return Topology(name, chip, shape, int(found[3] or 1))
