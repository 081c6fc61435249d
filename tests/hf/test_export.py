"""`save` leaves either a complete checkpoint or the directory as it was."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxrl_stable import hf
from jaxrl_stable.hf import copying
from jaxrl_stable.hf.config import from_json
from jaxrl_stable.model import ModelConfig
from tests.hf import ours, raw

saving = importlib.import_module("jaxrl_stable.hf.save")  # `hf.save` is the function

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    return ours.load(raw.FROZEN / "qwen3-moe.v5")  # float32


def damaged(model, value):
    """Changes a value of the last parameter before the head, so that much is written before it."""
    leaves, structure = jax.tree.flatten(model)
    leaves[-1] = leaves[-1].at[(-1,) * leaves[-1].ndim].set(value)
    return jax.tree.unflatten(structure, leaves)


def rounded(x, dtype):
    """Uses NumPy, so that nothing is compiled."""
    return np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float32)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_failed_save_leaves_nothing(value, model, tmp_path):
    with pytest.raises(ValueError, match="non-finite in float32; nothing was saved"):
        hf.save(damaged(model, value), tmp_path / "new", file_bytes=20_000)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(model, tmp_path):
    raw.copied("qwen3-moe.v5", tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="is not an empty directory; use a new one"):
        hf.save(model, tmp_path)
    with pytest.raises(ValueError, match="is not an empty directory; use a new one"):
        hf.save(model, tmp_path, like=tmp_path)
    assert content(tmp_path) == before


def test_interrupted_while_the_config_is_written(model, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        hf.save(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:overflow")
def test_values_too_large_for_the_stored_type(model, tmp_path):
    with pytest.raises(ValueError, match="non-finite in float16"):
        hf.save(damaged(model, 7e4), tmp_path / "new", dtype="float16")
    assert not list(tmp_path.iterdir())
    hf.save(damaged(model, 7e4), tmp_path / "new", dtype="bfloat16")


def test_links_are_followed_and_directories_copied(model, tmp_path):
    """Links, as in a hub cache, are followed; directories are copied as a whole."""
    origin, blob = tmp_path / "origin", tmp_path / "blob"
    raw.copied("qwen3-moe.v5", origin)
    blob.write_text("{}")
    (origin / "tokenizer.json").symlink_to(blob)
    (origin / "additional_chat_templates").mkdir()
    (origin / "additional_chat_templates" / "tool.jinja").write_text("x")
    hf.save(model, tmp_path / "new", like=origin)
    assert not (tmp_path / "new" / "tokenizer.json").is_symlink()
    assert (tmp_path / "new" / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert not (tmp_path / "new" / "expected.npz").exists()


@pytest.mark.parametrize("file_bytes", [1, 5_000, 40_000])
def test_files_are_split_and_indexed(file_bytes, model, tmp_path):
    hf.save(model, tmp_path, file_bytes=file_bytes)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    tensors = raw.read(tmp_path)
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in tensors.values())
    for file in files:
        inside = [len(tensors[n][2]) for n, place in index["weight_map"].items() if place == file]
        assert sum(inside) <= file_bytes or len(inside) == 1
    assert_same(ours.load(tmp_path), model)


@pytest.mark.parametrize(("dtype", "code"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_stored_type(dtype, code, model, tmp_path):
    hf.save(model, tmp_path, dtype=dtype)
    original = raw.read(raw.FROZEN / "qwen3-moe.v5")
    for name, (stored, _, data) in raw.read(tmp_path).items():
        assert stored == code
        wanted = np.frombuffer(original[name][2], np.float32)
        type_ = ml_dtypes.bfloat16 if code == "BF16" else np.float16
        assert data == wanted.astype(type_).tobytes(), name
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    loaded = ours.load(tmp_path)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
    assert_same(loaded, jax.tree.map(lambda x: rounded(x, dtype), model))


def test_router_of_deepseek_v3_stays_float32(tmp_path):
    """Expert choices depend on it; transformers always reads it in float32."""
    hf.save(ours.load(raw.FROZEN / "deepseek-v3.v4"), tmp_path, dtype="bfloat16")
    codes = {name: code for name, (code, *_) in raw.read(tmp_path).items()}
    for name, code in codes.items():
        assert code == ("F32" if ".mlp.gate." in name else "BF16"), name
    assert "F32" in codes.values()
    model = ours.load(tmp_path, param_dtype="bfloat16")
    assert model.stacks[1][0].mlp.selection_bias[...].dtype == jnp.float32


def test_half_precision_parameters_are_stored_as_they_are(model, tmp_path):
    half = ours.load(raw.FROZEN / "qwen3-moe.v5", param_dtype="bfloat16")
    hf.save(half, tmp_path)
    assert {code for code, *_ in raw.read(tmp_path).values()} == {"BF16"}
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half))
    assert_same(half, jax.tree.map(lambda x: rounded(x, "bfloat16"), model))


def test_companions_come_along(model, tmp_path):
    like = raw.copied("qwen3-moe.v5", tmp_path / "like")
    (like / "tokenizer.json").write_text("{1}")
    (like / "additional_chat_templates").mkdir()
    (like / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    config = json.loads((like / "config.json").read_text()) | {"eos_token_id": 7, "own": "kept"}
    (like / "config.json").write_text(json.dumps(config))
    hf.save(model, tmp_path / "out", like=like, dtype="bfloat16")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{1}"
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").exists()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    added = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "rope_theta": 1e6, "num_experts": 8}
    assert written == config | added


@pytest.mark.parametrize("like", [True, False])
@pytest.mark.parametrize("name", sorted(path.name for path in raw.FROZEN.iterdir()))
def test_config_is_spelled_for_both_versions(name, like, tmp_path):
    """Version 4 and many engines ignore `rope_parameters` and would use a default theta."""
    original = raw.FROZEN / name
    hf.save(ours.load(original), tmp_path, like=original if like else None)
    content = json.loads((tmp_path / "config.json").read_text())
    for unknown in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        known = {key: value for key, value in content.items() if key not in unknown}
        assert ModelConfig(**from_json(known)) == hf.read_config(original)
    if name.startswith("qwen3-moe"):
        assert content["num_experts"] == content["num_local_experts"] == 8


def test_prediction_layers_are_no_longer_promised(tmp_path):
    like = raw.changed("deepseek-v3.v4", tmp_path, num_nextn_predict_layers=1)
    hf.save(ours.load(like), tmp_path / "out", like=like)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("chunk_bytes", [1, 200])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen3-moe.v5", "per-expert"), ("mixtral.v5", "fused"), ("deepseek-v3.v5", "fused")],
)
def test_a_few_rows_at_a_time(name, layout, chunk_bytes, tmp_path, monkeypatch):
    """As with matrices of real size; the ones here would fit in one copy."""
    whole = ours.load(raw.FROZEN / name)
    monkeypatch.setattr(copying, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(copying, "STRIPE_ROWS", 5)
    model = ours.load(raw.FROZEN / name)
    assert_same(model, whole)
    original = raw.read(raw.FROZEN / name)
    dtype = "float32" if original["model.norm.weight"][0] == "F32" else "bfloat16"
    hf.save(model, tmp_path, layout=layout, dtype=dtype)
    assert raw.read(tmp_path) == original


def test_wrong_arguments(model, tmp_path):
    for options, said in (
        (dict(layout="packed"), "layout 'packed' is unknown; use one of per-expert, fused"),
        (dict(dtype="int8"), "dtype 'int8' is unknown; use one of float32, bfloat16, float16"),
        (dict(like=raw.FROZEN / "olmoe.v5"), "olmoe.v5 differs from the model in "),
    ):
        with pytest.raises(ValueError, match=said):
            hf.save(model, tmp_path / "out", **options)
    config = dataclasses.replace(model.config, routed_scaling=2.0)
    with pytest.raises(ValueError, match="no transformers architecture computes"):
        hf.save(ours.with_config(model, config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def assert_same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
