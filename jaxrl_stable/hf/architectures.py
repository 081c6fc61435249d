"""`config.json` to `ModelConfig` and back, for each architecture of transformers that is supported.

Reading refuses what would compute something else: an option that is not implemented is an error
that names the option, never a silent approximation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrl_stable.model.config import EXECUTION_FIELDS, LatentAttention, ModelConfig, Yarn

Json = dict[str, Any]


class Architecture(NamedTuple):
    """One `model_type` of transformers.

    Attributes:
      model_type: its name in `config.json`.
      class_name: the causal language model of transformers.
      read: fields of `ModelConfig` from the JSON object.
      write: JSON fields beyond the common ones, from a `ModelConfig`.
    """

    model_type: str
    class_name: str
    read: Callable[[Json], Json]
    write: Callable[[ModelConfig], Json]


def read_config(directory: str | pathlib.Path, **execution: Any) -> ModelConfig:
    """The architecture of a checkpoint directory.

    Args:
      directory: holds `config.json`.
      **execution: fields of `ModelConfig` that a checkpoint says nothing about, such as `dtype`,
        `param_dtype`, `remat` or `head_chunk`.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: the architecture, or an option of it, is not supported.
    """
    wrong = sorted(execution.keys() - set(EXECUTION_FIELDS))
    if wrong:
        raise ValueError(
            f"read_config got {wrong[0]}, which the checkpoint decides; give only "
            f"{', '.join(EXECUTION_FIELDS)}"
        )
    content, file = read_json(directory), pathlib.Path(directory) / "config.json"
    try:
        return ModelConfig(**from_json(content), **execution)
    except KeyError as error:
        raise ValueError(f"{file}: {error.args[0]} is missing; restore it") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_json(directory: str | pathlib.Path) -> Json:
    """The parsed `config.json` of a directory.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is not a JSON object.
    """
    file = pathlib.Path(directory) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; give a Hugging Face model directory")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object; download it again")
    return content


def from_json(content: Json) -> Json:
    """Fields of `ModelConfig` from a parsed `config.json`.

    Raises:
      KeyError, ValueError: a field is missing, or asks for what is not implemented.
    """
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    kind = content.get("model_type")
    if kind not in known:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(known)}")
    _refuse(content)
    return _common(content) | known[kind].read(content)


def to_json(config: ModelConfig) -> tuple[Architecture, Json]:
    """The architecture of transformers that computes this model, and its `config.json`.

    The first one whose JSON reads back as the same architecture: nothing is exported that another
    program would compute differently.

    Raises:
      ValueError: no supported architecture has this combination of options.
    """
    if not config.num_experts:  # then these have no meaning
        config = dataclasses.replace(config, **_dense())
    wanted = config.architecture()
    for architecture in ARCHITECTURES:
        content = _common_json(config) | architecture.write(config)
        content |= {
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
        }
        try:
            same = ModelConfig(**from_json(content)).architecture() == wanted
        except (ValueError, KeyError):
            same = False
        if same:
            return architecture, content
    raise ValueError(
        "no architecture of transformers computes this ModelConfig; supported are "
        f"{', '.join(a.model_type for a in ARCHITECTURES)}, each with its own router and attention"
    )


def _refuse(content: Json) -> None:
    """Options that are not implemented, with the values under which they do nothing."""
    harmless = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "hidden_act": ("silu", None),
        "quantization_config": (None,),
        "use_sliding_window": (False, None),
        "partial_rotary_factor": (1, None),
        "moe_layer_freq": (1, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "router_jitter_noise": (0, None),
    }
    for option, values in harmless.items():
        if content.get(option) not in values:
            raise ValueError(
                f"{option} = {content[option]!r} is not implemented; {_ADVICE.get(option, 'none')}"
            )
    window = content.get("sliding_window")
    if content.get("model_type") == "mixtral" and window is not None:
        if window < content.get("max_position_embeddings", math.inf):
            raise ValueError(
                f"sliding_window = {window} is not implemented; set it to null if your sequences "
                "stay shorter"
            )


_ADVICE = {"quantization_config": "convert the weights to bfloat16 first"}


def _common(content: Json) -> Json:
    """What all architectures name alike."""
    heads = content["num_attention_heads"]
    theta, scaling = _rotary(content)
    return dict(
        vocab_size=content["vocab_size"],
        hidden_size=content["hidden_size"],
        num_layers=content["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=content.get("head_dim") or content["hidden_size"] // heads,
        intermediate_size=content["intermediate_size"],
        rms_norm_eps=content["rms_norm_eps"],
        tie_embeddings=content.get("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _common_json(config: ModelConfig) -> Json:
    content = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        hidden_act="silu",
        attention_bias=False,
        # Both spellings: transformers 5 reads the first, version 4 and inference engines the others.
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rope_theta=config.rope_theta,
    )
    yarn = config.rope_scaling
    if yarn is not None:
        content["rope_scaling"] = dict(
            rope_type="yarn",
            factor=yarn.factor,
            original_max_position_embeddings=yarn.original_context,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
            attention_factor=yarn.rotation_scale,
            truncate=yarn.truncate,
        )
        if yarn.softmax_mscale:
            content["rope_scaling"]["mscale_all_dim"] = yarn.softmax_mscale
        content["rope_parameters"] = content["rope_scaling"] | {"rope_theta": config.rope_theta}
    return content


def _rotary(content: Json) -> tuple[float, Yarn | None]:
    """Base and stretching: `rope_parameters` of transformers 5, or the two fields of version 4."""
    scaling = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})
    theta = scaling.get("rope_theta", content.get("rope_theta"))
    if theta is None:
        raise KeyError("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor is not implemented; none of these models has it")
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise ValueError(f"rope_type {kind!r} is not implemented; 'default' and 'yarn' are")
    factor = scaling["factor"]

    def magnitude(mscale: float) -> float:  # arXiv:2309.00071, eq. 22
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    rotation = scaling.get("attention_factor")
    if rotation is None:
        rotation = magnitude(1)
        if mscale and all_dims:
            rotation = magnitude(mscale) / magnitude(all_dims)
    latent = content["model_type"] == "deepseek_v3"  # the one that scales its softmax as well
    return float(theta), Yarn(
        factor=float(factor),
        original_context=scaling["original_max_position_embeddings"],
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        rotation_scale=float(rotation),
        softmax_mscale=float(all_dims or 0) if latent else 0.0,
        truncate=scaling.get("truncate", True),
    )


def _experts(content: Json, *names: str) -> Json:
    """Experts of the softmax architectures; version 5 renamed their number."""
    number = next((content[name] for name in names if name in content), None)
    if number is None:
        raise KeyError(names[0])
    return dict(num_experts=number, num_experts_per_token=content["num_experts_per_tok"])


def _experts_json(config: ModelConfig, *names: str) -> Json:
    return {name: config.num_experts for name in names} | {
        "num_experts_per_tok": config.num_experts_per_token,
        "norm_topk_prob": config.norm_topk_prob,
        "output_router_logits": False,
    }


def _dense() -> Json:
    return dict(num_experts=0, num_experts_per_token=0, moe_intermediate_size=0)


def _read_qwen3_moe(content: Json) -> Json:
    return _experts(content, "num_experts", "num_local_experts") | dict(
        moe_intermediate_size=content["moe_intermediate_size"],
        norm_topk_prob=content.get("norm_topk_prob", False),
        decoder_sparse_step=content.get("decoder_sparse_step", 1),
        mlp_only_layers=tuple(content.get("mlp_only_layers") or ()),
    )


def _write_qwen3_moe(config: ModelConfig) -> Json:
    return _experts_json(config, "num_experts", "num_local_experts") | dict(
        moe_intermediate_size=config.moe_intermediate_size,
        decoder_sparse_step=config.decoder_sparse_step,
        mlp_only_layers=list(config.mlp_only_layers),
    )


def _read_olmoe(content: Json) -> Json:
    return _experts(content, "num_experts", "num_local_experts") | dict(
        moe_intermediate_size=content["intermediate_size"],
        norm_topk_prob=content.get("norm_topk_prob", False),
        query_key_norm="layer",
        clip_qkv=content.get("clip_qkv"),
    )


def _read_mixtral(content: Json) -> Json:
    return _experts(content, "num_local_experts", "num_experts") | dict(
        moe_intermediate_size=content["intermediate_size"], query_key_norm="none"
    )


def _read_deepseek_v3(content: Json) -> Json:
    plain, rotary = content["qk_nope_head_dim"], content["qk_rope_head_dim"]
    groups = content.get("n_group") or 1
    return dict(
        head_dim=plain + rotary,
        num_experts=content["n_routed_experts"],
        num_experts_per_token=content["num_experts_per_tok"],
        moe_intermediate_size=content["moe_intermediate_size"],
        norm_topk_prob=content.get("norm_topk_prob", True),
        router_score="sigmoid",
        selection_bias=True,
        expert_groups=groups,
        chosen_groups=(content.get("topk_group") or 1) if groups > 1 else 1,
        routed_scaling=float(content.get("routed_scaling_factor", 1.0)),
        num_shared_experts=content.get("n_shared_experts") or 0,
        mlp_only_layers=tuple(range(content.get("first_k_dense_replace", 0))),
        query_key_norm="none",
        latent=LatentAttention(
            key_value_rank=content["kv_lora_rank"],
            rotary_dim=rotary,
            value_dim=content["v_head_dim"],
            query_rank=content.get("q_lora_rank"),
            interleaved=content.get("rope_interleave", True),
        ),
    )


def _write_deepseek_v3(config: ModelConfig) -> Json:
    latent = config.latent or LatentAttention(0, 0, 0)
    return dict(
        head_dim=latent.rotary_dim,  # of the rotation, in transformers
        qk_head_dim=config.head_dim,
        qk_nope_head_dim=config.head_dim - latent.rotary_dim,
        qk_rope_head_dim=latent.rotary_dim,
        v_head_dim=latent.value_dim,
        kv_lora_rank=latent.key_value_rank,
        q_lora_rank=latent.query_rank,
        rope_interleave=latent.interleaved,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_token,
        moe_intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=config.expert_groups,
        topk_group=config.chosen_groups,
        routed_scaling_factor=config.routed_scaling,
        n_shared_experts=config.num_shared_experts,
        first_k_dense_replace=len(config.mlp_only_layers),
        num_nextn_predict_layers=0,
        moe_layer_freq=1,
    )


# Dense models come first: a Qwen3-MoE without experts is written as what it is.
ARCHITECTURES = (
    Architecture("qwen3", "Qwen3ForCausalLM", lambda content: _dense(), lambda config: {}),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe),
    Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        _read_olmoe,
        lambda config: _experts_json(config, "num_experts") | {"clip_qkv": config.clip_qkv},
    ),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        _read_mixtral,
        lambda config: _experts_json(config, "num_local_experts") | {"sliding_window": None},
    ),
    Architecture("deepseek_v3", "DeepseekV3ForCausalLM", _read_deepseek_v3, _write_deepseek_v3),
)
