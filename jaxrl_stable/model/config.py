"""Policy architecture, and the repeating patterns of its layers.

One set of fields covers Qwen3 (dense and MoE), OLMoE, Mixtral and DeepSeek-V3; `hf.architectures`
reads them from a Hugging Face `config.json`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

from jaxrl_stable.checks import field_types, one_of, positive, within

# Fields that determine how a model is computed and used, not what it computes. Configs that differ
# only in these fields can share a checkpoint.
EXECUTION_FIELDS = (
    "dtype",
    "param_dtype",
    "scan_layers",
    "remat",
    "attention",
    "experts",
    "experts_exchange",
    "experts_rows",
    "head_chunk",
    "max_positions",
)


DTYPES = ("float32", "bfloat16")
PARAM_DTYPES = (*DTYPES, "float16")  # float16 keeps the weights of such a checkpoint as they are
# Types that users ask for and that do not work, with the reason.
NOT_SUPPORTED = {
    "float16": "its products are not available on every device and overflow at 65,504",
    "float64": "jax computes it in float32 unless told otherwise, and kernels lack it",
}


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched to longer contexts (Peng et al. 2023, arXiv:2309.00071).

    Attributes:
      factor: ratio of the new context length to the original one.
      original_context: context length of the original training, in positions.
      beta_fast, beta_slow: rotation counts over the original context. Frequencies with more than
        `beta_fast` rotations are kept, frequencies with fewer than `beta_slow` are divided by
        `factor`, and a linear ramp interpolates in between.
      rotation_scale: factor on cosines and sines.
      softmax_mscale: m in the factor (0.1 m ln(factor) + 1)² on the scale of attention logits
        (DeepSeek-V3: `mscale_all_dim`); 0 leaves the scale unchanged.
      truncate: whether to round the ends of the ramp outwards to whole dimensions.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rotation_scale: float = 1.0
    softmax_mscale: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        field_types(self)
        positive(self, "original_context")
        within(self, "factor", "beta_fast", "beta_slow", "rotation_scale", above=0)
        within(self, "softmax_mscale")

    @property
    def softmax_scale(self) -> float:
        return (0.1 * self.softmax_mscale * math.log(max(self.factor, 1.0)) + 1.0) ** 2


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1).

    Attributes:
      key_value_rank: width of the latent from which keys and values are computed.
      rotary_dim: number of rotated dimensions per query and key head; the rest carry no position.
      value_dim: size of one value head.
      query_rank: width of the queries' own latent; None projects queries directly.
      interleaved: if True, rotated pairs are neighbours (0, 1), (2, 3), …; if False, the members
        of a pair are half a head apart.
    """

    key_value_rank: int
    rotary_dim: int
    value_dim: int
    query_rank: int | None = None
    interleaved: bool = True

    def __post_init__(self) -> None:
        field_types(self)
        positive(self, "key_value_rank", "rotary_dim", "value_dim", "query_rank")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, dense or with experts; defaults follow Qwen3-MoE.

    Attributes:
      vocab_size: V, size of the vocabulary.
      hidden_size: D, width of the model.
      num_layers: depth, dense layers included.
      num_heads: H, number of query heads.
      num_kv_heads: G, number of key/value heads; divides H.
      head_dim: size of one query or key head; H * head_dim need not equal D.
      intermediate_size: width of the dense feed-forward layers.
      num_experts: E, experts per MoE layer; 0 makes every layer dense.
      num_experts_per_token: K, experts chosen per token.
      moe_intermediate_size: F, width of one expert.
      norm_topk_prob: whether gates are renormalised over the chosen experts.
      router_score: "softmax" over all experts, or "sigmoid" of each.
      selection_bias: whether each expert has a bias that affects the choice but never the gates.
        It is not trained here (DeepSeek-V3, arXiv:2412.19437, §2.1.2).
      expert_groups: number of equal groups into which the experts are divided.
      chosen_groups: number of groups that experts are chosen from. These are the groups whose two
        best scores have the largest sum.
      routed_scaling: factor on the gates.
      num_shared_experts: number of experts applied to every token; computed as one dense layer of
        their total width.
      decoder_sparse_step: layer i (from 0) is MoE if i + 1 is a multiple of this.
      mlp_only_layers: layers that are dense regardless of `decoder_sparse_step`.
      query_key_norm: RMSNorm of queries and keys over each "head" (Qwen3), over all heads of the
        "layer" (OLMoE), or "none" (Mixtral).
      clip_qkv: bound on |query|, |key| and |value| before the rotary embedding, or None.
      latent: sizes of latent attention, or None for grouped-query attention.
      rope_theta: base of the rotary embedding.
      rope_scaling: YaRN stretching of the rotary embedding, or None.
      rms_norm_eps: epsilon of every norm.
      tie_embeddings: whether the output head is the transposed embedding.
      dtype: compute dtype of activations, and of weights in matrix products. Router, norms,
        attention weights and log-probabilities are always float32.
      param_dtype: storage dtype of the parameters; the optimiser works in float32.
      scan_layers: whether to scan over repeated layers (one compiled body) or unroll them.
      remat: activations that a block keeps for the backward pass: "none" keeps all of them,
        "dots" the most expensive products (queries, keys, values, attention, the experts' hidden
        layer), "block" only its input, and "offload" that input in host memory.
      attention: attention kernel: "auto", "xla", "cudnn" or "splash".
      experts: grouped matrix product: "auto", "ragged", "blocked", "megablox", "tokamax", or
        "dense" (every expert on every token; the reference that tests compare against).
      experts_exchange: how tokens reach experts on other devices: "all_gather" or
        "ragged_all_to_all"; see `expert_parallel`.
      experts_rows: capacity of a device's buffer of (token, choice) pairs, in rows of D numbers;
        tokens that exceed it pass through the experts in several chunks.
      head_chunk: number of tokens per device whose logits are in memory at a time; rounded to whole
        columns.
      max_positions: context length that the model was trained for, in positions; runs with longer
        sequences are refused. 0 means unknown and allows any length. It does not change what the
        model computes.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    router_score: str = "softmax"
    selection_bias: bool = False
    expert_groups: int = 1
    chosen_groups: int = 1
    routed_scaling: float = 1.0
    num_shared_experts: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    query_key_norm: str = "head"
    clip_qkv: float | None = None
    latent: LatentSizes | None = None
    rope_theta: float = 1_000_000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    experts: str = "auto"
    experts_exchange: str = "all_gather"
    experts_rows: int = 262_144
    head_chunk: int = 2048
    max_positions: int = 0

    def __post_init__(self) -> None:
        field_types(self)
        for field, allowed in (("dtype", DTYPES), ("param_dtype", PARAM_DTYPES)):
            value = getattr(self, field)
            if value in NOT_SUPPORTED and value not in allowed:
                raise ValueError(
                    f"ModelConfig.{field} is {value!r}, which is not supported "
                    f"({NOT_SUPPORTED[value]}); use 'bfloat16' or 'float32'"
                )
            one_of(self, field, allowed)
        one_of(self, "router_score", ("softmax", "sigmoid"))
        one_of(self, "query_key_norm", ("head", "layer", "none"))
        one_of(self, "remat", ("none", "dots", "block", "offload"))
        one_of(self, "attention", ("auto", "xla", "cudnn", "splash"))
        experts = ("auto", "ragged", "blocked", "megablox", "tokamax", "dense")
        one_of(self, "experts", experts)
        one_of(self, "experts_exchange", ("all_gather", "ragged_all_to_all"))
        positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        positive(self, "head_dim", "decoder_sparse_step", "expert_groups", "chosen_groups")
        positive(self, "experts_rows", "head_chunk")
        within(self, "intermediate_size", "num_experts", "num_experts_per_token", at_least=0)
        within(self, "num_shared_experts", "max_positions", at_least=0)
        within(self, "clip_qkv", "rope_theta", "rms_norm_eps", "routed_scaling", above=0)
        if self.num_experts:
            positive(self, "moe_intermediate_size")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig.num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"ModelConfig rotates {self.rotary_dim} of {self.head_dim} dimensions per head; "
                "use an even number, at most head_dim"
            )
        if any(not 0 <= layer < self.num_layers for layer in self.mlp_only_layers):
            raise ValueError(
                f"ModelConfig.mlp_only_layers is {self.mlp_only_layers}; layers are numbered from "
                f"0 to {self.num_layers - 1}"
            )
        if self.num_experts and not 0 < self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"ModelConfig.num_experts_per_token is {self.num_experts_per_token}; "
                f"it must be between 1 and num_experts ({self.num_experts})"
            )
        if self.router_score == "softmax" and (self.selection_bias or self.expert_groups > 1):
            raise ValueError(
                "ModelConfig.selection_bias and expert_groups need router_score='sigmoid', not "
                "'softmax'"
            )
        if self.expert_groups > 1:
            self._check_groups()

    def _check_groups(self) -> None:
        size, rest = divmod(self.num_experts, self.expert_groups)
        if rest or size < 2:
            raise ValueError(
                f"ModelConfig.expert_groups is {self.expert_groups}; it must divide num_experts "
                f"({self.num_experts}) into equal groups of two or more"
            )
        fewest = -(-self.num_experts_per_token // size)
        if not fewest <= self.chosen_groups <= self.expert_groups:
            raise ValueError(
                f"ModelConfig.chosen_groups is {self.chosen_groups}; it must be between {fewest} "
                f"(enough for num_experts_per_token) and expert_groups ({self.expert_groups})"
            )

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions per query or key head."""
        return self.latent.rotary_dim if self.latent else self.head_dim

    def is_moe(self, layer: int) -> bool:
        """Returns whether layer `layer` (from 0) has experts, as in `Qwen3MoeDecoderLayer`."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """L, the number of layers with a router."""
        return sum(map(self.is_moe, range(self.num_layers)))

    def architecture(self) -> dict[str, object]:
        """Returns the fields that a checkpoint depends on."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in EXECUTION_FIELDS}

    @classmethod
    def from_architecture(cls, fields: dict[str, Any], **execution: Any) -> ModelConfig:
        """Inverse of `architecture`; also accepts fields that were stored as JSON."""
        nested = {"latent": LatentSizes, "rope_scaling": Yarn}
        built = {
            name: nested[name](**value) if name in nested and value else value
            for name, value in fields.items()
        }
        built["mlp_only_layers"] = tuple(fields["mlp_only_layers"])
        return cls(**built, **execution)


def layer_plan(config: ModelConfig) -> list[tuple[tuple[bool, ...], int]]:
    """Splits the depth into repeated patterns, each of which becomes one scan.

    Returns:
      `(pattern, repeats)` pairs in depth order. A pattern has one entry per layer, True if the
      layer is MoE. All-MoE gives `[((True,), 48)]`, three leading dense layers give
      `[((False,), 3), ((True,), 58)]`, alternating layers give `[((False, True), 24)]`.
    """
    kinds = [config.is_moe(i) for i in range(config.num_layers)]
    plan, start = [], 0
    while start < len(kinds):
        rest = kinds[start:]
        best = (1, 1)  # (period, repeats) that covers the most layers; the shortest wins ties
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == rest[:period]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        period, repeats = best
        plan.append((tuple(rest[:period]), repeats))
        start += period * repeats
    return plan


def tiny(**overrides: Any) -> ModelConfig:
    """Returns a config with a few hundred thousand parameters, for tests and laptops."""
    fields = dict(
        vocab_size=128,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=192,
        num_experts=8,
        num_experts_per_token=2,
        moe_intermediate_size=64,
        rope_theta=10_000.0,
        tie_embeddings=True,
    )
    return ModelConfig(**(fields | overrides))


def qwen3_30b_a3b(**overrides: Any) -> ModelConfig:
    """Returns the config of Qwen3-30B-A3B (from its public `config.json`)."""
    fields = dict(
        vocab_size=151_936,
        hidden_size=2_048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=6_144,
        num_experts=128,
        num_experts_per_token=8,
        moe_intermediate_size=768,
        max_positions=40_960,
        dtype="bfloat16",
        remat="block",
    )
    return ModelConfig(**(fields | overrides))


def qwen3_235b_a22b(**overrides: Any) -> ModelConfig:
    """Returns the config of Qwen3-235B-A22B (from its public `config.json`)."""
    fields = dict(
        vocab_size=151_936,
        hidden_size=4_096,
        num_layers=94,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=12_288,
        num_experts=128,
        num_experts_per_token=8,
        moe_intermediate_size=1_536,
        max_positions=40_960,
        dtype="bfloat16",
        remat="block",
    )
    return ModelConfig(**(fields | overrides))


def __getattr__(name: str) -> Any:
    """Resolves the former name of `LatentSizes`, which older gin files use."""
    if name == "LatentAttention":
        warnings.warn(
            "model.config.LatentAttention is now called LatentSizes; write model.LatentSizes",
            DeprecationWarning,
            stacklevel=2,
        )
        return LatentSizes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
