"""Small slices to compile for; tests that need the TPU compiler are skipped without it."""

from functools import cache

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxrl_stable.aot.topology import has_libtpu, parse_topology


@pytest.fixture(scope="session")
def slice_of():
    """`slice_of("v5e:2x4", (2, 4), ("data", "fsdp"))` is a mesh over the devices of a slice."""
    if not has_libtpu():
        pytest.skip("libtpu is not installed (the extra `tpu`)")
    devices = cache(lambda name: parse_topology(name).devices())

    def make(name, shape, axes):
        array = np.array(devices(name)).reshape(shape)
        return Mesh(array, axes, axis_types=(AxisType.Auto,) * len(axes))

    return make
