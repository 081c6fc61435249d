"""Architecture of the policy, and how its layers repeat.

One set of fields covers Qwen3 (dense and MoE), OLMoE, Mixtral and DeepSeek-V3; `hf.architectures`
reads them from a Hugging Face `config.json`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

# Fields that say how a model is computed, not what it computes: two configs that differ in these
# alone can share a checkpoint.
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
)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched to longer contexts (Peng et al. 2023, arXiv:2309.00071).

    Attributes:
      factor: new context over old one.
      original_context: positions that the model was trained on before.
      beta_fast, beta_slow: rotations over that context above which a frequency stays, and below
        which it is divided by `factor`; between them a linear ramp.
      rotation_scale: factor on cosines and sines.
      softmax_mscale: m in the factor (0.1 m ln(factor) + 1)² on the scale of attention logits
        (DeepSeek-V3: `mscale_all_dim`); 0 leaves it.
      truncate: round the ends of the ramp outwards to whole dimensions.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    rotation_scale: float = 1.0
    softmax_mscale: float = 0.0
    truncate: bool = True

    @property
    def softmax_scale(self) -> float:
        return (0.1 * self.softmax_mscale * math.log(max(self.factor, 1.0)) + 1.0) ** 2


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1).

    Attributes:
      key_value_rank: width of the latent that keys and values are made of.
      rotary_dim: part of each query and key head that is rotated; the rest has no position.
      value_dim: size of one value head.
      query_rank: width of the queries' own latent; None projects them directly.
      interleaved: rotated pairs are neighbours (0, 1), (2, 3), …; else they are half a head apart.
    """

    key_value_rank: int
    rotary_dim: int
    value_dim: int
    query_rank: int | None = None
    interleaved: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, dense or with experts; the defaults are those of Qwen3-MoE.

    Attributes:
      vocab_size: V, size of the vocabulary.
      hidden_size: D.
      num_layers: depth, dense layers included.
      num_heads: H, query heads.
      num_kv_heads: G, key/value heads; divides H.
      head_dim: size of one query or key head; H * head_dim need not be D.
      intermediate_size: width of the dense feed-forward layers.
      num_experts: E; 0 makes every layer dense.
      num_experts_per_token: K.
      moe_intermediate_size: F, width of one expert.
      norm_topk_prob: gates are renormalised over the chosen experts.
      router_score: "softmax" over all experts, or "sigmoid" of each.
      selection_bias: a bias per expert that takes part in the choice, never in the gates. Nothing
        here trains it (DeepSeek-V3, arXiv:2412.19437, §2.1.2).
      expert_groups, chosen_groups: experts stand in groups, and only those of the groups with the
        largest sums of two best scores can be chosen.
      routed_scaling: factor on the gates.
      num_shared_experts: experts that every token passes; they are one dense layer of their width.
      decoder_sparse_step: layer i (from 0) is MoE when (i + 1) is a multiple of it.
      mlp_only_layers: layers that are dense whatever the step says.
      query_key_norm: RMSNorm of queries and keys over each "head" (Qwen3), over all heads of the
        "layer" (OLMoE), or "none" (Mixtral).
      clip_qkv: bound on |query|, |key|, |value| before the rotation, or None.
      latent: sizes of latent attention instead of grouped queries, or None.
      rope_theta: base of the rotary embedding.
      rope_scaling: how it is stretched, or None.
      rms_norm_eps: epsilon of every norm.
      tie_embeddings: the output head is the transposed embedding.
      dtype: type of activations and of weights in products. Router, norms, attention weights and
        log-probabilities are float32 whatever it is.
      param_dtype: type in which parameters are stored; they are optimised in float32.
      scan_layers: scan over repeated layers (one compiled body) or unroll them.
      remat: what a block keeps for the backward pass: "none" keeps all, "dots" the products that
        cost most (queries, keys, values, attention, the experts' hidden layer), "block" its input
        alone, "offload" that input in the host's memory.
      attention: "auto", "xla", "cudnn" or "splash".
      experts: grouped matrix product: "auto", "ragged", "blocked", "megablox", "tokamax", or
        "dense" (every expert on every token: the oracle of tests).
      experts_exchange: how tokens reach experts on other devices: "all_gather" or
        "ragged_all_to_all"; see `expert_parallel`.
      experts_rows: room of a device's buffer of (token, choice) pairs, in rows of D numbers; tokens
        pass the experts in as many lots as that takes.
      head_chunk: tokens of a device whose logits exist at a time; rounded to whole columns.
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

    def __post_init__(self):
        choices = {
            "router_score": ("softmax", "sigmoid"),
            "query_key_norm": ("head", "layer", "none"),
            "remat": ("none", "dots", "block", "offload"),
            "attention": ("auto", "xla", "cudnn", "splash"),
            "experts": ("auto", "ragged", "blocked", "megablox", "tokamax", "dense"),
            "experts_exchange": ("all_gather", "ragged_all_to_all"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"ModelConfig.{field} is {getattr(self, field)!r}; use one of {allowed}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig.num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        positive = ("vocab_size", "hidden_size", "num_layers", "decoder_sparse_step")
        positive += ("experts_rows", "head_chunk")
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"ModelConfig.{field} is {getattr(self, field)}; use at least 1")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"ModelConfig rotates {self.rotary_dim} of head_dim {self.head_dim}; rotary pairs "
                "need an even number, at most head_dim"
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
                "ModelConfig.selection_bias and expert_groups are defined for router_score "
                "'sigmoid' alone"
            )
        if self.expert_groups > 1:
            self._check_groups()

    def _check_groups(self):
        size, rest = divmod(self.num_experts, self.expert_groups)
        if rest or size < 2:
            raise ValueError(
                f"ModelConfig.expert_groups is {self.expert_groups}; it must cut num_experts "
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
        """Dimensions of a query or key head that carry the position."""
        return self.latent.rotary_dim if self.latent else self.head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts (the rule of `Qwen3MoeDecoderLayer`)."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """L, the number of layers that have a router."""
        return sum(map(self.is_moe, range(self.num_layers)))

    def architecture(self) -> dict[str, object]:
        """The fields that a checkpoint depends on."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in EXECUTION_FIELDS}

    @classmethod
    def from_architecture(cls, fields: dict, **execution) -> ModelConfig:
        """The inverse of `architecture`, also after a journey through JSON."""
        nested = {"latent": LatentSizes, "rope_scaling": Yarn}
        built = {
            name: nested[name](**value) if name in nested and value else value
            for name, value in fields.items()
        }
        built["mlp_only_layers"] = tuple(fields["mlp_only_layers"])
        return cls(**built, **execution)


def layer_plan(config: ModelConfig) -> list[tuple[tuple[bool, ...], int]]:
    """Splits the depth into repeated patterns, so that each can be one scan.

    Returns:
      `(pattern, repeats)` pairs in depth order; a pattern says for each of its layers whether it is
      MoE. All-MoE gives `[((True,), 48)]`, three leading dense layers `[((False,), 3), ((True,),
      58)]`, alternation `[((False, True), 24)]`.
    """
    kinds = [config.is_moe(i) for i in range(config.num_layers)]
    plan, start = [], 0
    while start < len(kinds):
        rest = kinds[start:]
        best = (1, 1)  # (period, repeats) that covers the most layers; the shortest period wins
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


def tiny(**overrides) -> ModelConfig:
    """A policy of a few hundred thousand parameters, for tests and laptops."""
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


def qwen3_30b_a3b(**overrides) -> ModelConfig:
    """Qwen3-30B-A3B (its public `config.json`)."""
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
        dtype="bfloat16",
        remat="block",
    )
    return ModelConfig(**(fields | overrides))


def qwen3_235b_a22b(**overrides) -> ModelConfig:
    """Qwen3-235B-A22B (its public `config.json`)."""
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
        dtype="bfloat16",
        remat="block",
    )
    return ModelConfig(**(fields | overrides))


def __getattr__(name: str) -> Any:
    """Resolves the former name of `LatentSizes`, which older gin files bind."""
    if name == "LatentAttention":
        warnings.warn(
            "model.config.LatentAttention is now called LatentSizes; write model.LatentSizes",
            DeprecationWarning,
            stacklevel=2,
        )
        return LatentSizes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
