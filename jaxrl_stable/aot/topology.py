"""TPU slices to compile for, on a machine without TPUs, and the speeds of their chips.

A topology is named as in Google Cloud, `v5e:16x16` or `v5p:4x4x4`: chips along each dimension of
the torus. `v5e:16x16*2` is two such slices, joined by the data-centre network (DCN).

Speeds and memory are from Google Cloud, docs.cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e.
Bandwidths of links between chips (ICI, one way) and of the network between slices are from "How to
Scale Your Model", jax-ml.github.io/scaling-book/tpus; they are a tenth below the nominal values on
Google Cloud's pages.
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
    """Figures for one chip type.

    Attributes:
      name: name of the chip in topologies.
      hbm: bytes of main memory that a program may use. The compiler keeps the rest of the nominal
        16, 95 and 32 GB; this figure is from its own message when a program does not fit.
      flops: FLOPs per second in dense bfloat16 products.
      hbm_bandwidth: bytes per second of main memory.
      link_bandwidth: bytes per second over one ICI link in one direction. A chip has two links per
        dimension of the torus.
      dimensions: number of dimensions of the torus.
      dcn_bandwidth: bytes per second from a chip to other slices: its share of the host's network.
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

# libtpu asks the cloud's metadata server and the environment which machine it runs on, and
# complains if neither answers. Compilation does not need the answer.
_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process dies on a lock file
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several TPU slices to compile for.

    Attributes:
      name: full name, including the number of slices.
      chip: figures of the chips.
      shape: chips along each dimension of one slice.
      slices: number of slices.
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
        """Returns the devices; programs can be compiled for them but cannot run.

        Raises:
          ValueError: if libtpu is not installed or does not know the slice.
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
    """Returns whether libtpu, the compiler for TPUs, is installed."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    return True


def parse_topology(name: str) -> Topology:
    """Parses a topology, such as `v5p:4x4x4` or `v5e:16x16*2`.

    Raises:
      ValueError: if the form or the chip is unknown, or the number of dimensions is wrong.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"--topology={name!r} is unknown; write chip:AxB or chip:AxBxC, followed by *N "
            f"for N slices, where the chip is one of {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if len(shape) != chip.dimensions:
        raise ValueError(
            f"--topology={name!r} has {len(shape)} dimensions; slices of {chip.name} have "
            f"{chip.dimensions}"
        )
    return Topology(name, chip, shape, int(found[3] or 1))
