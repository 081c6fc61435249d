"""Fingerprint of weights: every bit counts, where it is counts, the mesh does not."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.configs import MeshShape
from jaxrl_stable.run.fingerprint import fingerprint
from jaxrl_stable.sharding import make_mesh

pytestmark = pytest.mark.fast


def tree(change=lambda a: None, dtype=np.float32):
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.zeros((2, 2), np.int8)}
    change(arrays)
    return {"a": jnp.asarray(arrays["a"], dtype), "b": jnp.asarray(arrays["b"])}


def swap(arrays):
    arrays["a"][0, 1], arrays["a"][1, 0] = arrays["a"][1, 0], arrays["a"][0, 1]


def flip_a_bit(arrays):
    arrays["a"].view(np.uint32)[2, 3] ^= 1


def negative_zero(arrays):
    arrays["a"][0, 0] = -0.0


def two_that_cancel(arrays):
    arrays["a"][0, 0] += 1
    arrays["a"][0, 1] -= 1


def another_shape(arrays):
    arrays["a"] = arrays["a"].reshape(4, 3)


def another_array(arrays):
    arrays["b"][1, 1] = 1


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshShape(), jax.devices()[:1])


def test_equal_bits_have_equal_fingerprints(mesh):
    assert fingerprint(tree(), mesh) == fingerprint(tree(), mesh)
    assert len(fingerprint(tree(), mesh)) == 32


@pytest.mark.parametrize(
    "change", [swap, flip_a_bit, negative_zero, two_that_cancel, another_shape, another_array]
)
def test_what_changes_it(mesh, change):
    assert fingerprint(tree(change), mesh) != fingerprint(tree(), mesh)


def test_the_type_and_the_names_count(mesh):
    plain = fingerprint(tree(), mesh)
    assert fingerprint(tree(dtype=jnp.bfloat16), mesh) != plain
    assert fingerprint({"c": tree()["a"], "b": tree()["b"]}, mesh) != plain


def by_hand():
    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    bits = [0x3F80, 0xC000]
    sums = [
        sum(mix(b ^ mix((salt + i) % 2**32)) for i, b in enumerate(bits)) % 2**32
        for salt in (0x9E3779B9, 0x7F4A7C15)
    ]
    about = [("['w']", "bfloat16", [2], sums)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def test_the_value_of_one_tree_by_hand(mesh):
    """Records are compared with those of later versions, so the definition must not change."""
    assert fingerprint({"w": jnp.asarray([1.0, -2.0], jnp.bfloat16)}, mesh) == by_hand()
