"""Checkpoints written by transformers 4 and 5 give the results of transformers.

`make_fixtures.py` made the files. `tests/parity` compares more architectures in more depth, live.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxrl_stable import hf
from jaxrl_stable.hf.files import DTYPES, TensorFiles
from tests.hf import batches, ours

FROZEN = pathlib.Path(__file__).parent / "frozen"
TOLERANCE = 2e-5  # relative to the largest entry; log-probabilities in nats
every = pytest.mark.parametrize("name", sorted(path.name for path in FROZEN.iterdir()))


@functools.cache
def model(name):
    return ours.load(FROZEN / name)


@functools.cache
def expected(name):
    with np.load(FROZEN / name / "expected.npz", allow_pickle=False) as file:
        return dict(file)


def batch(name):
    return tuple(expected(name)[key] for key in ("tokens", "positions", "segments"))


@functools.cache
def observed(name):
    return ours.observe(model(name), *batch(name))


def layout(name):
    fused = any(tensor.endswith("experts.down_proj") for tensor in contents(FROZEN / name))
    return "fused" if fused else "per-expert"


def contents(directory):
    """Returns type, shape and values of every tensor."""
    files = TensorFiles(directory)
    return {
        name: (files.codes[name], shape, np.array(files.view(name)))
        for name, shape in files.shapes.items()
    }


def assert_same_tensors(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, (code, shape, values) in wanted.items():
        assert actual[name][:2] == (code, shape), name
        np.testing.assert_array_equal(actual[name][2], values, err_msg=name)


@pytest.mark.fast
@every
def test_forward(name):
    real = expected(name)["segments"] != 0
    for key in ("hidden", "logits", "logp", "gates"):
        actual, wanted = observed(name)[key], expected(name)[key]
        if key == "gates":
            actual, wanted = actual[:, real], wanted[:, real]
        else:
            actual, wanted = actual[real], wanted[real]
        scale = 1.0 if key == "logp" else np.max(np.abs(wanted), initial=0.0)
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE * scale, err_msg=key)


@pytest.mark.fast
@every
def test_experts(name):
    real = expected(name)["segments"] != 0
    chosen = expected(name)["gates"] > 0
    np.testing.assert_array_equal(observed(name)["experts"][:, real], chosen[:, real])


@every
def test_greedy_tokens_through_the_cache(name):
    tokens, _, segments = batch(name)
    np.testing.assert_array_equal(
        ours.greedy(model(name), tokens, segments)[0], expected(name)["response"]
    )


@pytest.mark.parametrize("name", ["deepseek-v3.v4", "qwen3-moe.v5"])
def test_gradients(name):
    wanted = expected(name)
    names = set(wanted["gradient_names"])
    fused = any(tensor.endswith("experts.down_proj") for tensor in names)  # in memory, not in files
    actual = ours.gradients(model(name), *batch(name), "fused" if fused else "per-expert")
    buffers = {tensor for tensor in actual if tensor.endswith("e_score_correction_bias")}
    assert actual.keys() - buffers == names
    for tensor, norm, places, entries in zip(
        *(wanted[f"gradient_{key}"] for key in ("names", "norms", "places", "entries"))
    ):
        gradient = actual[tensor].ravel()
        assert np.linalg.norm(gradient) == pytest.approx(norm, rel=5e-5), tensor
        scale = 5e-5 * np.max(np.abs(gradient))
        np.testing.assert_allclose(gradient[places], entries, rtol=0, atol=scale, err_msg=tensor)


@every
@pytest.mark.parametrize("like", [True, False])
def test_export_returns_the_same_tensors(name, like, tmp_path):
    wanted = contents(FROZEN / name)
    dtype = DTYPES[wanted["model.norm.weight"][0]].name
    original = FROZEN / name if like else None
    hf.save(model(name), tmp_path, dtype=dtype, layout=layout(name), like=original)
    assert_same_tensors(contents(tmp_path), wanted)
    assert hf.read_config(tmp_path) == hf.read_config(FROZEN / name)
    if like:
        before, after = (json.loads((d / "config.json").read_text()) for d in (original, tmp_path))
        added = {"torch_dtype", "dtype", "num_nextn_predict_layers"}
        assert {key: after[key] for key in before.keys() - added} == {
            key: before[key] for key in before.keys() - added
        }


@every
def test_other_layout_is_the_same_model(name, tmp_path):
    other = {"fused": "per-expert", "per-expert": "fused"}[layout(name)]
    hf.save(model(name), tmp_path, layout=other, file_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    for a, b in zip(jax.tree.leaves(ours.load(tmp_path)), jax.tree.leaves(model(name))):
        np.testing.assert_array_equal(a, b)


def test_every_way_of_storing_is_there():
    """The files cover both versions, both layouts, all types, single and several files."""
    names = [path.name for path in FROZEN.iterdir()]
    assert {name.split(".")[1] for name in names} == {"v4", "v5"}
    assert {layout(name) for name in names} == {"fused", "per-expert"}
    assert {code for n in names for code, *_ in contents(FROZEN / n).values()} == set(DTYPES)
    indexed = {(FROZEN / name / "model.safetensors.index.json").exists() for name in names}
    assert indexed == {True, False}
    assert all(batch(name)[0].shape == batches.SHAPE for name in names)
