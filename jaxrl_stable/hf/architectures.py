"""Maps each supported architecture's `config.json` to the fields of `ModelConfig` and back.

A new family also needs its tensor names (`names.py`) and the options that it refuses (`config.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrl_stable.model.config import LatentSizes, ModelConfig

Json = dict[str, Any]


class Architecture(NamedTuple):
    """One `model_type` of transformers.

    Attributes:
      model_type: name of the architecture in `config.json`.
      class_name: name of its causal language model class in transformers.
      read: converts the JSON object to fields of `ModelConfig`.
      write: converts a `ModelConfig` to the JSON fields that not all architectures share.
      float32: suffixes of the names of tensors that are always stored in float32
        (transformers: `_keep_in_fp32_modules_strict`).
    """

    model_type: str
    class_name: str
    read: Callable[[Json], Json]
    write: Callable[[ModelConfig], Json]
    float32: tuple[str, ...] = ()


def _experts(content: Json, *names: str) -> Json:
    """Returns the expert fields for softmax routers.

    `names` are the possible keys for the number of experts, which transformers 5 renamed.
    """
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


def no_experts() -> Json:
    """Returns neutral values for the expert fields, which do not apply to a dense model."""
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
        # The only possible value, because the query norm spans `hidden_size`.
        head_dim=content["hidden_size"] // content["num_attention_heads"],
        query_key_norm="layer",
        clip_qkv=content.get("clip_qkv"),
    )


def _read_mixtral(content: Json) -> Json:
    return _experts(content, "num_local_experts", "num_experts") | dict(
        moe_intermediate_size=content["intermediate_size"], query_key_norm="none"
    )


def _read_deepseek_v3(content: Json) -> Json:
    plain, rotary = content["qk_nope_head_dim"], content["qk_rope_head_dim"]
    groups = content["n_group"] or 1
    if not content["n_routed_experts"]:
        raise ValueError("n_routed_experts is 0; transformers has no dense model of this kind")
    return dict(
        head_dim=plain + rotary,
        num_kv_heads=content["num_attention_heads"],  # all heads share one latent
        num_experts=content["n_routed_experts"],
        num_experts_per_token=content["num_experts_per_tok"],
        moe_intermediate_size=content["moe_intermediate_size"],
        norm_topk_prob=content.get("norm_topk_prob", True),
        router_score="sigmoid",
        selection_bias=True,
        expert_groups=groups,
        chosen_groups=(content["topk_group"] or 1) if groups > 1 else 1,
        routed_scaling=float(content["routed_scaling_factor"]),
        num_shared_experts=content["n_shared_experts"] or 0,
        mlp_only_layers=tuple(
            range(min(content["first_k_dense_replace"], content["num_hidden_layers"]))
        ),
        query_key_norm="none",
        latent=LatentSizes(
            key_value_rank=content["kv_lora_rank"],
            rotary_dim=rotary,
            value_dim=content["v_head_dim"],
            query_rank=content.get("q_lora_rank"),
            interleaved=content.get("rope_interleave", True),
        ),
    )


def _write_deepseek_v3(config: ModelConfig) -> Json:
    latent = config.latent or LatentSizes(1, 2, 1)  # placeholder; `to_json` rejects the result
    return dict(
        head_dim=latent.rotary_dim,  # transformers uses it for rotary embeddings
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


# Qwen3 comes first, so that a Qwen3-MoE model without experts is written as Qwen3.
ARCHITECTURES = (
    Architecture("qwen3", "Qwen3ForCausalLM", lambda content: no_experts(), lambda config: {}),
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
    Architecture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _read_deepseek_v3,
        _write_deepseek_v3,
        # The whole router, because expert choices are sensitive to rounding.
        float32=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    ),
)
