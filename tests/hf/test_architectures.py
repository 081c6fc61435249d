"""Reads and writes `config.json`: unsupported options are refused, and writing round-trips."""

import dataclasses
import json
import math

import pytest

from jaxrl_stable import hf
from jaxrl_stable.hf.config import from_json, to_json
from jaxrl_stable.model import ModelConfig, qwen3_30b_a3b, qwen3_235b_a22b, tiny
from jaxrl_stable.model.config import LatentSizes, Yarn
from tests.hf import raw

pytestmark = pytest.mark.fast
NAMES = sorted(path.name for path in raw.FROZEN.iterdir())
MODELS = {
    "tiny": tiny(),
    "tiny, dense first": tiny(mlp_only_layers=(0,)),
    "tiny, dense": tiny(num_experts=0),
    "30b": qwen3_30b_a3b(),
    "235b": qwen3_235b_a22b(),
    "alternating": tiny(num_layers=4, decoder_sparse_step=2, norm_topk_prob=False),
    "mixtral": tiny(query_key_norm="none", intermediate_size=64),
    "olmoe": tiny(query_key_norm="layer", intermediate_size=64, clip_qkv=8.0),
    "yarn": tiny(rope_scaling=Yarn(4.0, 32768, rotation_scale=1.2, truncate=False)),
}


def edited(tmp_path, name, **changes):
    """Calls `read_config` on a frozen config with changed values; `...` removes a key."""
    content = json.loads((raw.FROZEN / name / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return hf.read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3-moe.v5", dict(attention_bias=True), "attention_bias = True is not implemented"),
        ("qwen3.v5", dict(use_sliding_window=True), "use_sliding_window = True"),
        ("mixtral.v5", dict(sliding_window=64), "sliding_window = 64 .* set it to null"),
        ("qwen3.v5", dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (
            "qwen3.v5",
            dict(quantization_config={"bits": 4}),
            "quantization_config .* bfloat16, then remove it",
        ),
        ("deepseek-v3.v5", dict(scoring_func="softmax"), "scoring_func = 'softmax'"),
        ("deepseek-v3.v5", dict(topk_method="greedy"), "topk_method = 'greedy'"),
        ("deepseek-v3.v5", dict(moe_layer_freq=2), "moe_layer_freq = 2"),
        ("mixtral.v5", dict(router_jitter_noise=0.1), "router_jitter_noise = 0.1"),
        ("qwen3.v4", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("qwen3.v4", dict(rope_scaling={"rope_type": "linear", "factor": 2}), "rope_type 'linear'"),
        ("qwen3.v4", dict(rope_scaling={"type": "dynamic", "factor": 2}), "rope_type 'dynamic'"),
        (
            "qwen3.v5",
            dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
            "rope_type 'llama3'",
        ),
        (
            "qwen3.v5",
            dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        ("qwen3.v5", dict(model_type="llama"), "'llama' is not supported; supported are qwen3,"),
        ("qwen3.v5", dict(model_type=...), "model_type None is not supported"),
        ("qwen3.v5", dict(num_attention_heads="4"), r"config\.json: "),
        ("deepseek-v3.v5", dict(n_group=3), "expert_groups is 3"),
    ],
)
def test_unsupported(name, changes, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        edited(tmp_path, name, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_window_that_covers_the_context_does_nothing(tmp_path):
    assert edited(tmp_path, "mixtral.v4", sliding_window=512) == hf.read_config(
        raw.FROZEN / "mixtral.v4"
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("qwen3.v5", key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")),
        *(("qwen3.v5", key) for key in ("intermediate_size", "rms_norm_eps")),
        *(("qwen3-moe.v4", key) for key in ("num_experts", "num_experts_per_tok", "rope_theta")),
        ("qwen3-moe.v5", "moe_intermediate_size"),
        ("mixtral.v4", "num_local_experts"),
        *(("deepseek-v3.v5", key) for key in ("kv_lora_rank", "v_head_dim", "n_routed_experts")),
        # transformers has defaults for these (DeepSeek-V3's); ours would differ.
        *(("deepseek-v3.v5", key) for key in ("n_group", "topk_group", "routed_scaling_factor")),
        *(("deepseek-v3.v5", key) for key in ("n_shared_experts", "first_k_dense_replace")),
    ],
)
def test_missing_key(name, key, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json: {key} is missing; restore it"):
        edited(tmp_path, name, **{key: ...})


def test_rope_scaling_that_was_added_to_a_config_of_version_5(tmp_path):
    """The usual advice for longer contexts; both versions follow it and ignore the other theta."""
    scaling = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)
    said = r"rope_scaling has no rope_theta .* = 10000.0 would be ignored; add rope_theta to"
    with pytest.raises(ValueError, match=said):
        edited(tmp_path, "qwen3.v5", rope_scaling=scaling)
    with pytest.raises(ValueError, match="rope_theta is missing"):
        edited(tmp_path, "qwen3.v5", rope_scaling=scaling, rope_parameters=...)
    config = edited(tmp_path, "qwen3.v5", rope_scaling=scaling | {"rope_theta": 300.0})
    assert config.rope_theta == 300.0 and config.rope_scaling.factor == 2.0
    config = edited(tmp_path, "qwen3.v5", rope_scaling=scaling, rope_theta=500.0)
    assert config.rope_theta == 500.0 and config.rope_scaling.factor == 2.0


def test_yarn_as_deepseek_spells_it(tmp_path):
    """Values of DeepSeek-V3's published config; both mscales are one."""
    scaling = dict(
        type="yarn", factor=40, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1
    )
    scaling["original_max_position_embeddings"] = 4096
    yarn = edited(tmp_path, "deepseek-v3.v4", rope_scaling=scaling).rope_scaling
    assert yarn == Yarn(40.0, 4096, 32.0, 1.0, rotation_scale=1.0, softmax_mscale=1.0)
    assert yarn.softmax_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    scaling["mscale"] = 0.5
    yarn = edited(tmp_path, "deepseek-v3.v4", rope_scaling=scaling).rope_scaling
    assert yarn.rotation_scale == pytest.approx(
        (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    )
    del scaling["mscale"], scaling["mscale_all_dim"]
    yarn = edited(tmp_path, "deepseek-v3.v4", rope_scaling=scaling).rope_scaling
    assert yarn.rotation_scale == pytest.approx(0.1 * math.log(40) + 1)
    assert yarn.softmax_scale == 1


@pytest.mark.fast
def test_context_that_a_model_was_trained_for(tmp_path):
    def read(name="qwen3.v5", **changes):
        return edited(tmp_path, name, **changes).max_positions

    assert read(max_position_embeddings=64) == 64
    assert read(max_position_embeddings=...) == read(max_position_embeddings=None) == 0
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
    # DeepSeek's files have the stretched context; Qwen's keep the one before.
    for stated in (128, 40):
        assert read(max_position_embeddings=stated, rope_scaling=yarn) == 128
    assert read(max_position_embeddings=256, rope_scaling=yarn) == 256
    with pytest.raises(ValueError, match=r"max_positions is '64'; it must be a whole number"):
        read(max_position_embeddings="64")
    # A user may know better. The context is no part of the model that a checkpoint holds.
    edited(tmp_path, "qwen3.v5", max_position_embeddings=64)
    config = hf.read_config(tmp_path, max_positions=4096)
    assert config.max_positions == 4096
    assert config.architecture() == hf.read_config(tmp_path).architecture()
    assert to_json(config)[1]["max_position_embeddings"] == 4096
    assert "max_position_embeddings" not in to_json(dataclasses.replace(config, max_positions=0))[1]


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; use a Hugging Face"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_config_that_is_no_json_object(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: .*JSON.*; fix or delete it"):
        hf.read_config(tmp_path)


def test_execution_is_the_callers(tmp_path):
    config = hf.read_config(raw.FROZEN / "qwen3.v5", dtype="bfloat16", remat="block")
    assert (config.dtype, config.remat) == ("bfloat16", "block")
    with pytest.raises(ValueError, match="num_layers, which the checkpoint determines"):
        hf.read_config(raw.FROZEN / "qwen3.v5", num_layers=2)


def assert_round_trip(config):
    architecture, content = to_json(config)
    content = json.loads(json.dumps(content))  # as it is stored
    again = ModelConfig(**from_json(content)).architecture()
    assert again == config.architecture()
    assert content["model_type"] == architecture.model_type


@pytest.mark.parametrize("name", NAMES)
def test_frozen_configs_round_trip(name):
    config = hf.read_config(raw.FROZEN / name)
    assert_round_trip(config)
    kind = json.loads((raw.FROZEN / name / "config.json").read_text())["model_type"]
    assert to_json(config)[0].model_type == kind


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tiny, dense"])
def test_configs_round_trip(name):
    assert_round_trip(MODELS[name])


def test_versions_spell_the_same_config():
    """Names of fields and rotary options changed between the versions; the models did not."""
    for name in {name.split(".")[0] for name in NAMES}:
        older, newer = (hf.read_config(raw.FROZEN / f"{name}.{v}") for v in ("v4", "v5"))
        assert older == newer


def test_models_without_experts_are_written_as_dense_ones():
    architecture, content = to_json(MODELS["tiny, dense"])
    assert architecture.model_type == "qwen3" and content["architectures"] == ["Qwen3ForCausalLM"]


def test_special_tokens_are_not_those_of_the_first_model():
    """If they were missing, transformers would take those of Mixtral or DeepSeek-V3."""
    for name in NAMES:
        _, content = to_json(hf.read_config(raw.FROZEN / name))
        assert all(content[f"{kind}_token_id"] is None for kind in ("bos", "eos", "pad"))


@pytest.mark.parametrize(
    "options",
    [
        dict(router_score="sigmoid"),  # without a selection bias
        dict(num_shared_experts=1),
        dict(routed_scaling=2.0),
        dict(clip_qkv=1.0),
        dict(query_key_norm="none"),  # Mixtral's, with another width of dense layers
        dict(query_key_norm="none", intermediate_size=64, norm_topk_prob=False),
        dict(query_key_norm="layer", intermediate_size=64, head_dim=8),  # D / H is 16
        dict(query_key_norm="none", num_experts=0),
        dict(router_score="sigmoid", selection_bias=True),  # without latent attention
        dict(latent=LatentSizes(8, 4, 8)),
        dict(rope_scaling=Yarn(2.0, 64, softmax_mscale=1.0)),
    ],
)
def test_export_refuses_what_no_architecture_computes(options):
    with pytest.raises(ValueError, match="no transformers architecture computes this"):
        to_json(tiny(**options))


def test_refusal_of_near_misses():
    """Changes one field of DeepSeek-V3 at a time."""
    config = hf.read_config(raw.FROZEN / "deepseek-v3.v5")
    to_json(config)
    for change in (
        dict(selection_bias=False),
        dict(query_key_norm="head"),
        dict(num_kv_heads=2),
        dict(mlp_only_layers=(1,)),
        dict(decoder_sparse_step=2),
        dict(clip_qkv=1.0),
    ):
        with pytest.raises(ValueError, match="no transformers architecture"):
            to_json(dataclasses.replace(config, **change))
