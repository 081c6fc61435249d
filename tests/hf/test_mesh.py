"""Loads a checkpoint straight into the shards of eight devices, and saves it again."""

import json
import os
import pathlib
import subprocess
import sys

SCRIPT = """
import json, pathlib, sys, tempfile
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jaxrl_stable import hf
from jaxrl_stable.configs import MeshShape
from jaxrl_stable.hf import copying
from jaxrl_stable.hf.names import parameters
from jaxrl_stable.run.fingerprint import fingerprint
from jaxrl_stable.sharding import make_mesh, mesh_axes

one = make_mesh(MeshShape(), jax.devices()[:1])
copying.CHUNK_BYTES = 200  # several copies for each matrix
cut = set()
for directory in map(pathlib.Path, sys.argv[1:]):
    alone = hf.load(directory, one)
    whole = parameters(alone)
    for sizes in ((1, 2, 2, 2), (2, 1, 4, 1), (1, 4, 1, 2)):
        mesh = make_mesh(MeshShape(*sizes))
        model = hf.load(directory, mesh)
        assert fingerprint(model, mesh) == fingerprint(alone, one)
        sharded = parameters(model)
        assert sharded.keys() == whole.keys()
        for path, param in sharded.items():
            value = param.get_value()
            assert len(value.sharding.device_set) == 8
            np.testing.assert_array_equal(value, whole[path].get_value(), err_msg=path)
            for shard in value.addressable_shards:  # replicas too
                wanted = np.asarray(whole[path].get_value())[shard.index]
                np.testing.assert_array_equal(shard.data, wanted, err_msg=path)
            spec = value.sharding.spec
            for axis, entry in enumerate(spec):
                cut |= {(path.split(".")[-1], axis, name) for name in mesh_axes(entry)}
    with tempfile.TemporaryDirectory() as target:
        hf.save(model, target, layout="fused")
        for path, param in parameters(hf.load(target, one)).items():
            np.testing.assert_array_equal(param.get_value(), whole[path].get_value(), err_msg=path)
print(json.dumps(sorted(cut)))
"""
# Parameters and their sharded axes; a wrong offset in any of them would show.
CUTS = {
    *(("gate", axis, name) for axis, name in ((1, "expert"), (2, "fsdp"), (3, "tensor"))),
    *(("down", axis, name) for axis, name in ((1, "expert"), (2, "tensor"), (3, "fsdp"))),
    *(("query", axis, name) for axis, name in ((1, "fsdp"), (2, "tensor"))),
    *(("out", axis, name) for axis, name in ((1, "tensor"), (3, "fsdp"))),
    *(("head", axis, name) for axis, name in ((0, "fsdp"), (1, "tensor"))),
    *(("embedding", axis, name) for axis, name in ((0, "tensor"), (1, "fsdp"))),
    ("weight", 1, "tensor"),  # OLMoE's query norm
    *(("query", 1, "expert"), ("head", 0, "expert")),  # one axis over two mesh axes
    ("up", 2, "tensor"),  # up-projection of the latent to keys and values of each head
    ("router", 1, "fsdp"),
}


def test_sharded_load_is_the_unsharded_one_bit_for_bit():
    frozen = pathlib.Path(__file__).parent / "frozen"
    names = ("qwen3.v5", "qwen3-moe.v5", "olmoe.v4", "mixtral.v5", "deepseek-v3.v4")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(frozen / name) for name in names)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert set(map(tuple, json.loads(result.stdout))) >= CUTS
