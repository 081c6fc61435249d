"""Architecture of the policy: the fields of Qwen3-MoE, and how its layers repeat."""

from __future__ import annotations

import dataclasses

# Fields that say how a model is computed, not what it computes: two configs that differ in these
# alone can share a checkpoint.
EXECUTION_FIELDS = (
    "dtype",
    "param_dtype",
    "scan_layers",
    "remat",
    "attention",
    "experts",
    "head_chunk",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Qwen3-MoE (transformers `Qwen3MoeConfig`; names follow it where they are clear).

    Attributes:
      vocab_size: V, size of the vocabulary.
      hidden_size: D.
      num_layers: depth, dense layers included.
      num_heads: H, query heads.
      num_kv_heads: G, key/value heads; divides H.
      head_dim: size of one head; H * head_dim need not be D.
      intermediate_size: width of the dense feed-forward layers.
      num_experts: E; 0 makes every layer dense.
      num_experts_per_token: K.
      moe_intermediate_size: F, width of one expert.
      norm_topk_prob: gates are renormalised over the chosen experts.
      decoder_sparse_step: layer i (from 0) is MoE when (i + 1) is a multiple of it.
      mlp_only_layers: layers that are dense whatever the step says.
      rope_theta: base of the rotary embedding.
      rms_norm_eps: epsilon of every norm.
      tie_embeddings: the output head is the transposed embedding.
      dtype: type of activations and of weights in products. Router, norms, attention weights and
        log-probabilities are float32 whatever it is.
      param_dtype: type in which parameters are stored and optimised.
      scan_layers: scan over repeated layers (one compiled body) or unroll them.
      remat: what the backward pass recomputes: "none", "dots" (all but dense projections; products
        with batch axes, such as attention, are recomputed) or "block" (everything).
      attention: "auto", "xla" or "cudnn".
      experts: grouped matrix product: "auto", "ragged", "blocked", "tokamax", or "dense" (every
        expert on every token: the oracle of tests).
      head_chunk: tokens of `[B, T]` whose logits exist at a time; rounded to whole columns.
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
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    experts: str = "auto"
    head_chunk: int = 2048

    def __post_init__(self):
        choices = {
            "remat": ("none", "dots", "block"),
            "attention": ("auto", "xla", "cudnn"),
            "experts": ("auto", "ragged", "blocked", "tokamax", "dense"),
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
        positive = ("vocab_size", "hidden_size", "num_layers", "decoder_sparse_step", "head_chunk")
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"ModelConfig.{field} is {getattr(self, field)}; use at least 1")
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim is {self.head_dim}; rotary pairs need it even")
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
