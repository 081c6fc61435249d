"""Small random models of every supported architecture, made with transformers.

Used by the live comparison and by `make_fixtures.py`; needs torch and transformers.
"""

import numpy as np
import torch
import transformers

COMMON = dict(
    vocab_size=72,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    attn_implementation="eager",
)
SPARSE = dict(moe_intermediate_size=20, num_experts_per_tok=3)
LATENT = dict(
    num_key_value_heads=4,
    n_routed_experts=8,
    moe_intermediate_size=20,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    kv_lora_rank=12,
    qk_rope_head_dim=6,
    qk_nope_head_dim=10,
    v_head_dim=9,
    tie_word_embeddings=False,
)
YARN = dict(
    rope_type="yarn",
    type="yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=32.0,
    beta_slow=1.0,
)


def rotary(theta, **scaling):
    """Base and stretching as this version of transformers spells them."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}
    return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})


# Name: class prefix, and what differs from `COMMON`.
ZOO = {
    "qwen3": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True) | rotary(1e4)),
    "qwen3-yarn": ("Qwen3", dict(head_dim=12, tie_word_embeddings=False) | rotary(1e4, **YARN)),
    "qwen3-moe": (
        "Qwen3Moe",
        SPARSE | dict(head_dim=12, num_experts=8, norm_topk_prob=True) | rotary(1e6),
    ),
    "qwen3-moe-unnormalised": (
        "Qwen3Moe",
        SPARSE
        | dict(head_dim=12, num_experts=8, norm_topk_prob=False, mlp_only_layers=[1])
        | rotary(1e6),
    ),
    "olmoe": (
        "Olmoe",
        dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=1.5)
        | rotary(1e4),
    ),
    "mixtral": ("Mixtral", dict(num_local_experts=6, num_experts_per_tok=2) | rotary(1e6)),
    "deepseek-v3": (
        "DeepseekV3",
        LATENT
        | dict(q_lora_rank=10, n_group=4, topk_group=2, n_shared_experts=1)
        | dict(routed_scaling_factor=2.5, norm_topk_prob=True)
        | rotary(1e4, **YARN, mscale=0.8, mscale_all_dim=1.0),
    ),
    "moonlight": (
        "DeepseekV3",
        LATENT
        | dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2)
        | dict(routed_scaling_factor=2.446, norm_topk_prob=True)
        | rotary(5e4),
    ),
}


def build(name: str) -> torch.nn.Module:
    """The model in float32, its weights drawn so that routers and attention have opinions.

    Norm weights are not one and selection biases not zero: a forgotten one must show.
    """
    prefix, special = ZOO[name]
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | special))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for path, weight in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in path:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if path.endswith("e_score_correction_bias"):
                weight.copy_(0.1 * noise)
            elif weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            else:
                scale = 1.0 if "embed" in path else weight.shape[-1] ** -0.5
                weight.copy_(1.3 * scale * noise)
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask: a full row and two that are padded on the left."""
    tokens = np.random.default_rng(7).integers(1, COMMON["vocab_size"], (3, 14))
    mask = np.ones_like(tokens, bool)
    mask[1, :4] = mask[2, :9] = False
    return np.where(mask, tokens, 0), mask
