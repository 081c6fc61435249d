"""Small random models of every supported architecture, made with transformers.

Used by the live comparison and by `make_fixtures.py`; needs torch and transformers.
"""

import torch
import transformers

from tests.hf import batches

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
VERSION = int(transformers.__version__.split(".")[0])
# The code in the model files, not a replacement kernel.
PLAIN = dict(attn_implementation="eager")
if VERSION >= 5:
    PLAIN["experts_implementation"] = "eager"
COMMON = dict(
    vocab_size=batches.VOCAB,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    **PLAIN,
)
SPARSE = dict(moe_intermediate_size=10, num_experts_per_tok=3, head_dim=8, num_experts=8)
LATENT = dict(
    num_key_value_heads=4,
    n_routed_experts=8,
    moe_intermediate_size=10,
    num_experts_per_tok=3,
    kv_lora_rank=12,
    qk_rope_head_dim=6,
    qk_nope_head_dim=5,
    v_head_dim=9,
    tie_word_embeddings=False,
)
# With a base of 100, both ends of the ramp fall among the few frequencies, and are rounded.
YARN = dict(
    rope_type="yarn",
    type="yarn",
    factor=4.0,
    original_max_position_embeddings=128,
    beta_fast=4.0,
    beta_slow=0.5,
)


def rotary(theta, **scaling):
    """Returns rotary base and scaling as this version of transformers spells them."""
    if VERSION >= 5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}
    return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


# Name: class prefix, and differences from `COMMON`.
ZOO = {
    "qwen3": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True) | rotary(1e4)),
    "qwen3-yarn": ("Qwen3", dict(head_dim=8, tie_word_embeddings=False) | rotary(1e2, **YARN)),
    "qwen3-moe": (
        "Qwen3Moe",
        SPARSE | dict(norm_topk_prob=True, mlp_only_layers=[0]) | rotary(1e6),
    ),
    # Every second layer: two patterns of layers, one of them repeated.
    "qwen3-moe-alternating": (
        "Qwen3Moe",
        SPARSE
        | dict(norm_topk_prob=False, num_hidden_layers=5, decoder_sparse_step=2)
        | rotary(1e6),
    ),
    "olmoe": (
        "Olmoe",
        dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=1.5)
        | dict(intermediate_size=10)
        | rotary(1e4),
    ),
    "mixtral": (
        "Mixtral",
        dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=10) | rotary(1e6),
    ),
    "deepseek-v3": (
        "DeepseekV3",
        LATENT
        | dict(q_lora_rank=10, n_group=4, topk_group=2, n_shared_experts=1)
        | dict(routed_scaling_factor=2.5, norm_topk_prob=True, first_k_dense_replace=1)
        | rotary(1e2, **YARN, mscale=0.8, mscale_all_dim=1.0),
    ),
    "moonlight": (
        "DeepseekV3",
        LATENT
        | dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2)
        | dict(routed_scaling_factor=2.446, norm_topk_prob=True, first_k_dense_replace=1)
        | rotary(5e4),
    ),
    # Options that neither DeepSeek-V3 nor Moonlight uses.
    "deepseek-v3-variant": (
        "DeepseekV3",
        LATENT
        | dict(q_lora_rank=10, n_group=2, topk_group=1, n_shared_experts=1)
        | dict(routed_scaling_factor=1.5, norm_topk_prob=False, first_k_dense_replace=2)
        | dict(rope_interleave=False)
        | rotary(1e2, **YARN, truncate=False),
    ),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """Builds the model in float32, with weights that make routers and attention decisive.

    Norm weights differ from one and selection biases from zero, so that a forgotten one shows.
    """
    prefix, special = ZOO[name]
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | special))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + seed)
    with torch.no_grad():
        for path, weight in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in path:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if path.endswith("e_score_correction_bias"):
                # Version 4 prefers experts of masked groups (score 0) to negative scores; version
                # 5 and DeepSeek's own code never do.
                weight.copy_(0.1 * noise + (0.4 if VERSION < 5 else 0.0))
            elif weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                # At this scale, tied embeddings do not just repeat the last token.
                scale = 0.3 if "embed" in path else weight.shape[-1] ** -0.5
                weight.copy_(1.3 * scale * noise)
    return model


def again(model: torch.nn.Module, directory, **options) -> torch.nn.Module:
    """Loads a directory with the class of `model`.

    Raises:
      ValueError: if tensors are missing, unexpected or misshapen; transformers only warns.
    """
    loaded, report = type(model).from_pretrained(
        directory, output_loading_info=True, **PLAIN, **options
    )
    if any(report.values()):
        raise ValueError(f"{directory} does not fit transformers: {report}")
    return loaded.eval()
