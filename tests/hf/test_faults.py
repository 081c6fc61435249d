"""All faults of a checkpoint are listed in one line, and nothing is returned."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxrl_stable import hf
from tests.hf import ours, raw

NORM = "model.norm.weight"
SHARDS = "deepseek-v3.v5"
INDEX = "model.safetensors.index.json"


def refused(directory, *patterns, error=ValueError):
    """Checks that loading fails with one line that matches all patterns in this order."""
    with pytest.raises(error) as caught:
        ours.load(directory)
    message = str(caught.value)
    assert re.search(".*".join(patterns), message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(NORM), r"missing: model\.norm\.weight\. Nothing was loaded"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": raw.zeros("BF16", 32)}),
            r"extra: model\.layers\.0\.self_attn\.q_proj\.bias\.",
        ),
        (
            lambda t: t.update({NORM: raw.zeros("BF16", 23)}),
            r"misshapen: model\.norm\.weight is \[23\], not \[24\]",
        ),
        (
            lambda t: t.update({NORM: raw.zeros("BF16", 24, 1)}),
            r"misshapen: model\.norm\.weight is \[24, 1\], not \[24\]",
        ),
        (lambda t: t.update({NORM: raw.zeros("I8", 24)}), r"unknown dtype: model\.norm.* is I8"),
        (lambda t: t.update({NORM: raw.zeros("F8_E4M3", 24)}), r"unknown dtype: .* is F8_E4M3"),
        (lambda t: t.update({"model.layers.3.mlp.up": raw.zeros("BF16", 1)}), "extra: .*layers.3"),
    ],
)
def test_tensors_that_do_not_fit(edit, said, tmp_path):
    directory = raw.changed("qwen3.v5", tmp_path, edit)
    refused(directory, "does not match its config.json", said)
    with pytest.raises(ValueError, match=said):
        hf.check(directory, hf.read_config(directory))


def test_the_home_directory_and_buckets(monkeypatch):
    monkeypatch.setenv("HOME", str(raw.FROZEN))
    assert hf.read_config("~/qwen3.v5") == hf.read_config(raw.FROZEN / "qwen3.v5")
    with pytest.raises(ValueError, match=r"read_config\.directory is 'gs://bucket/x', but only"):
        hf.read_config("gs://bucket/x")


def test_a_check_without_values(tmp_path):
    config = hf.read_config(raw.FROZEN / "qwen3.v5")
    hf.check(raw.FROZEN / "qwen3.v5", config)
    other = dataclasses.replace(config, hidden_size=2 * config.hidden_size)
    with pytest.raises(ValueError, match=r"holds a different model: hidden_size is \d+ there and"):
        hf.check(raw.FROZEN / "qwen3.v5", other)
    with pytest.raises(FileNotFoundError):
        hf.check(tmp_path, config)


def test_every_fault_is_listed_in_one_line(tmp_path):
    def edit(tensors):
        del tensors["model.layers.0.input_layernorm.weight"]
        tensors["other"] = raw.zeros("F32", 1)
        tensors[NORM] = raw.zeros("BF16", 2)
        tensors["model.embed_tokens.weight"][0] = "I16"

    said = ("missing: .*input_layernorm", "extra: other", r"misshapen: .*\[2\]", "dtype: .*is I16")
    refused(raw.changed("qwen3.v5", tmp_path, edit), *said)


def test_long_lists_are_cut(tmp_path):
    def edit(tensors):
        tensors.update({f"other{i:02d}": raw.zeros("F32", 1) for i in range(13)})

    refused(raw.changed("qwen3.v5", tmp_path, edit), "other00.*other09 and 3 more")


def test_experts_that_are_missing(tmp_path):
    """Drops one of 8 experts, and all experts of a layer, which does not make it dense."""

    def edit(tensors):
        for name in list(tensors):
            if ".1.mlp.experts.3.up" in name or ".2.mlp.experts" in name:
                del tensors[name]

    refused(
        raw.changed("qwen3-moe.v5", tmp_path, edit),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj",
        r"layers\.2\.mlp\.experts\.0\.down",
        "and 15 more",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["qwen3-moe.v4", "qwen3-moe.v5", "olmoe.v4"])  # BF16, F32, F16
def test_values_that_are_not_finite(name, value, tmp_path):
    places = ("model.layers.2.mlp.experts.7.down_proj.weight", "model.norm.weight")

    def edit(tensors):
        for place in places:
            tensors[place] = raw.with_value(tensors[place], value, 21)

    refused(
        raw.changed(name, tmp_path, edit),
        "non-finite values in " + ", ".join(map(re.escape, places)),
    )


def test_largest_finite_value_is_fine(tmp_path):
    def edit(tensors):
        tensors[NORM] = raw.with_value(tensors[NORM], 3.38953139e38, 3)  # largest of bfloat16

    model = ours.load(raw.changed("qwen3.v5", tmp_path, edit))
    assert model.norm.weight[...][3] == np.float32(3.38953139e38)


def test_missing_file(tmp_path):
    directory = raw.copied(SHARDS, tmp_path)
    (directory / "model-00002-of-00003.safetensors").unlink()
    refused(directory, "model-00002-of-00003.safetensors is missing", error=FileNotFoundError)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_damaged_file(length, tmp_path):
    directory = raw.copied(SHARDS, tmp_path)
    file = directory / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(directory, "model-00002-of-00003.safetensors is damaged")


def test_index_that_says_what_is_not_so(tmp_path):
    directory = raw.copied(SHARDS, tmp_path)
    file = directory / "model-00003-of-00003.safetensors"
    tensors = raw.read(directory)
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    rest = {name: tensors[name] for name, place in index.items() if place == file.name}
    del rest[NORM]
    raw.write(file, rest)
    refused(directory, "00003-of-00003.safetensors lacks model.norm.weight, which .*index.json")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(content, tmp_path):
    directory = raw.copied(SHARDS, tmp_path)
    (directory / INDEX).write_text(content)
    refused(directory, "index.json(: .*JSON| has no weight_map)")


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/model.safetensors", 3])
def test_index_that_leads_out_of_the_directory(place, tmp_path):
    directory = raw.copied(SHARDS, tmp_path)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][NORM] = place
    (directory / INDEX).write_text(json.dumps(index))
    refused(directory, "only plain file names are allowed")


def test_tensor_in_another_file_than_the_index_says(tmp_path):
    directory = raw.copied(SHARDS, tmp_path)
    index = json.loads((directory / INDEX).read_text())
    there = index["weight_map"][NORM]
    other = next(file for file in index["weight_map"].values() if file != there)
    index["weight_map"][NORM] = other
    (directory / INDEX).write_text(json.dumps(index))
    refused(directory, f"{there} contains {NORM}, but .* places it in {other}")


def test_no_weights(tmp_path):
    (raw.changed("qwen3.v5", tmp_path) / "model.safetensors").unlink()
    refused(tmp_path, "has neither model.safetensors nor", error=FileNotFoundError)


def test_no_directory(tmp_path):
    refused(tmp_path / "none", "config.json does not exist", error=FileNotFoundError)


def test_config_of_another_model(tmp_path):
    directory = raw.FROZEN / "qwen3.v5"
    other = hf.read_config(raw.FROZEN / "qwen3-moe.v5")
    with pytest.raises(ValueError, match="num_experts is 0 there and 8 here"):
        ours.load(directory, other)


@pytest.mark.parametrize("shards_left", [True, False])
def test_an_index_next_to_a_single_file_is_stale(shards_left, tmp_path):
    """`save_pretrained` leaves it behind; transformers loads the single file."""
    directory = raw.copied(SHARDS, tmp_path)
    tensors = raw.read(directory)
    tensors[NORM] = raw.with_value(tensors[NORM], 123.0, 5)
    if not shards_left:
        for shard in directory.glob("model-*.safetensors"):
            shard.unlink()
    raw.write(directory / "model.safetensors", tensors)
    assert ours.load(directory).norm.weight[...][5] == 123.0


def test_prediction_layers_and_frequencies_are_ignored(tmp_path):
    """Layers behind the last one predict further tokens in DeepSeek-V3; they are not this model."""

    def edit(tensors):
        for name in ("eh_proj", "embed_tokens", "mlp.experts.0.up_proj", "self_attn.o_proj"):
            tensors[f"model.layers.3.{name}.weight"] = raw.zeros("BF16", 3, 5)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = raw.zeros("F32", 3)

    changed = raw.changed("deepseek-v3.v4", tmp_path, edit, num_nextn_predict_layers=1)
    same(ours.load(changed), "deepseek-v3.v4")
    # A config with fewer layers than the files would load half a model.
    refused(raw.changed("deepseek-v3.v4", tmp_path, edit), "extra: model.layers.3.eh_proj.weight")


def same(model, name):
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(ours.load(raw.FROZEN / name))):
        np.testing.assert_array_equal(a, b)
