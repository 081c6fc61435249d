"""Fingerprint of a model's weights: equal bits give equal fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

SALTS = (0x9E3779B9, 0x7F4A7C15)  # one 32-bit sum per array and salt


def fingerprint(model: Any, mesh: Mesh) -> str:
    """Returns 32 hexadecimal digits that depend on every bit of every array, and on its position.

    Each device reduces its own shards in one pass over the weights. The sums are modulo 2³² and
    therefore exact in any order: the mesh and the number of processes do not matter. The
    fingerprint guards against mistakes, not against deliberate collisions.

    Args:
      model: a tree of arrays, on the devices of `mesh`.
      mesh: device mesh of the run.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    whole = NamedSharding(mesh, PartitionSpec())
    sums = jax.device_get(jax.jit(_sums, out_shardings=whole)(arrays))
    about = [
        (name, str(arrays[name].dtype), list(arrays[name].shape), sums[name].tolist())
        for name in sorted(arrays)
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _sums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, "salts"]]:
    return {name: jnp.stack([_sum(x, salt) for salt in SALTS]) for name, x in arrays.items()}


def _sum(x: Array, salt: int) -> UInt32[Array, ""]:
    """Returns Σ mix(bits ⊕ mix(position + salt)) modulo 2³²."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.full(x.shape, salt, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        position += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(position)), dtype=jnp.uint32)


def _mix(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3: a bijection in which every input bit affects all 32."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
