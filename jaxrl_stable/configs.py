"""What an experiment is: frozen dataclasses that gin binds. One gin file is one experiment.

The library itself has no gin decorators; gin files import this module (dynamic registration) and
bind fields, for example `configs.Objective.replay = "R3"`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrl_stable.model.config import ModelConfig, tiny
from jaxrl_stable.objectives import MODES, TokenLoss, minirl

REPLAYS = ("none", "R2", "R3")
FORMATS = ("none", "int8")  # of the sampler's weights
LOGP_SOURCES = ("sampler", "rescored")


def _positive(config: Any, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) < 1:
            name = f"{type(config).__name__}.{field}"
            raise ValueError(f"{name} is {getattr(config, field)}; use at least 1")


def _one_of(config: Any, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in allowed:
        name = f"{type(config).__name__}.{field}"
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True)
class Objective:
    """MiniRL and its ablations (arXiv:2512.01374, eq. 7); see `objectives.minirl`.

    Attributes:
      mini_batches: N, gradient steps per rollout batch.
      replay: routing replayed in training: "none", "R2" (the training router's old choice) or "R3"
        (the sampler's choice).
      clip, clip_low, clip_high, clip_anchor, weight, truncation: see `minirl`.
      aggregation: "seq-mean-token-sum" (the paper), "seq-mean-token-mean" (its length-normalised
        ablation) or "token-mean".
    """

    mini_batches: int = 4
    replay: str = "R3"
    clip: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.27
    clip_anchor: str = "old"
    weight: str = "full"
    truncation: float | None = 5.0
    aggregation: str = "seq-mean-token-sum"

    def __post_init__(self):
        _one_of(self, "replay", REPLAYS)
        _one_of(self, "clip_anchor", ("old", "rollout"))
        _one_of(self, "weight", ("full", "mismatch", "none"))
        _one_of(self, "aggregation", MODES)
        if self.mini_batches < 1:
            raise ValueError(
                f"Objective.mini_batches is {self.mini_batches}; it must be at least 1"
            )
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(
                f"Objective.clip_low={self.clip_low}, clip_high={self.clip_high} are ε around "
                "a ratio of 1; use 0 < clip_low < 1 and clip_high > 0"
            )
        if self.truncation is not None and self.truncation <= 0:
            raise ValueError(
                f"Objective.truncation is {self.truncation}; it must be positive, or None"
            )

    @property
    def needs_score(self) -> bool:
        """Whether π_old needs a pass of its own: not with one update and nothing to replay."""
        return self.mini_batches > 1 or self.replay != "none"

    def token_loss(self, logp, logp_old, logp_rollout, advantages, mask) -> TokenLoss:
        """`minirl` with these settings."""
        return minirl(
            logp,
            logp_old,
            logp_rollout,
            advantages,
            mask,
            clip=self.clip,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            clip_anchor=self.clip_anchor,
            weight=self.weight,
            truncation=self.truncation,
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """Problems, tokenizer and reward.

    Attributes:
      train: source of training problems (`data.JsonlSource`, `data.ReasoningGymSource`, …).
      heldout: source of held-out problems.
      tokenizer: path of a SentencePiece model or of a Hugging Face `tokenizer.json`. Empty: that of
        `Experiment.init_from`, or a SentencePiece model that is trained on the problems and kept in
        the working directory.
      vocab_size: size of the tokenizer trained here.
      template: text around a problem; "{prompt}" stands for it.
      chat: whether that text becomes a message of the user, in the tokenizer's own chat template.
      system: system message of a chat; empty for none.
      chat_variables: what the chat template is told besides, such as `{"enable_thinking": False}`.
      prompt_width: P, longest prompt in tokens.
      reward: "numeric", "exact", "math", or "package.module:function".
      reward_timeout: seconds that a reward in a worker process may take for one response.
      reward_workers: such processes.
    """

    train: Any = None
    heldout: Any = None
    tokenizer: str = ""
    vocab_size: int = 128
    template: str = "{prompt}"
    chat: bool = False
    system: str = ""
    chat_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_width: int = 64
    reward: str = "numeric"
    reward_timeout: float = 5.0
    reward_workers: int = 1

    def __post_init__(self):
        for field in ("system", "chat_variables"):
            if getattr(self, field) and not self.chat:
                raise ValueError(f"Data.{field} is for chats; set Data.chat = True, or remove it")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and clipping by global norm.

    Attributes:
      learning_rate: after the warm-up.
      warmup_steps: gradient steps from 0 to the full rate.
      decay_steps: gradient steps over which a cosine takes the rate down to a tenth; 0 keeps it
        constant.
      b1, b2, eps: Adam's constants.
      weight_decay: decoupled decay of matrices; norms are left out.
      clip_norm: largest global norm of a gradient.
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Cold start: supervised training on prompt-answer pairs, packed.

    Attributes:
      demonstrations: source of prompt-answer pairs; None takes the training problems.
      steps: gradient steps.
      batch_size: packed rows per step.
      length: tokens of a row.
      optimizer: learning rate and the rest.
      checkpoint_every: steps between checkpoints.
    """

    demonstrations: Any = None
    steps: int = 1000
    batch_size: int = 32
    length: int = 256
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_steps=50)
    checkpoint_every: int = 200

    def __post_init__(self):
        _positive(self, "batch_size", "length", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Reinforcement:
    """Rollouts and updates.

    Attributes:
      steps: rollouts ("global steps"); each makes `objective.mini_batches` gradient steps.
      prompts: prompts of one rollout batch.
      group_size: responses to each prompt.
      max_tokens: longest response, EOS included.
      temperature: of the sampler, and hence of the policy that is trained.
      top_k, top_p: see `rollout.Sampling`; anything but 0 and 1 biases the gradient.
      rollout_format: weights of the sampler: "none" (the policy itself) or "int8".
      rollout_cache: the sampler keeps keys and values of past tokens. False runs the training
        program over all of them again for every token, for a mismatch of exactly 0: slow, for
        science and debugging; see `uncached`.
      logp_source: what the loss takes for log μ_old: "sampler", what the sampler recorded, or
        "rescored", the training program's log π_old (always with a pass of `score`). The mismatch
        part of the weight is then 1: staleness is corrected, and the bias of sampling from μ_old
        instead of π_old stays (arXiv:2512.01374, eq. 5). Metrics of the mismatch see what the
        sampler recorded in either case.
      objective: the loss and its replay.
      optimizer: learning rate and the rest.
      micro_batch_size: rows of one forward and backward pass.
      ratio_tolerance: bound of max |π_θ/π_old − 1| in the first mini-batch after a start; None is
        1e-5 in float32 and 0.1 in half precision.
      max_skipped: non-finite gradients in a row after which the run stops.
      max_failed_rewards: share of a rollout's responses whose reward may time out or break before
        the run stops.
      checkpoint_every: steps between checkpoints; every evaluated state gets one besides.
      keep_checkpoints: newest checkpoints that are kept, besides the best.
      show_every: steps between samples shown and stored.
    """

    steps: int = 100
    prompts: int = 32
    group_size: int = 8
    max_tokens: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rollout_format: str = "int8"
    rollout_cache: bool = True
    logp_source: str = "sampler"
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    micro_batch_size: int = 64
    ratio_tolerance: float | None = None
    max_skipped: int = 10
    max_failed_rewards: float = 0.1
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    show_every: int = 10

    def __post_init__(self):
        _one_of(self, "rollout_format", FORMATS)
        _one_of(self, "logp_source", LOGP_SOURCES)
        _positive(self, "prompts", "group_size", "max_tokens", "micro_batch_size", "max_skipped")
        _positive(self, "checkpoint_every", "keep_checkpoints", "show_every")
        rows, parts = self.prompts * self.group_size, self.objective.mini_batches
        if self.prompts % parts:
            raise ValueError(
                f"Reinforcement.prompts ({self.prompts}) must be a multiple of "
                f"Objective.mini_batches ({parts}), so that a mini-batch holds whole groups"
            )
        if (rows // parts) % self.micro_batch_size:
            raise ValueError(
                f"a mini-batch has {rows // parts} rows (prompts × group_size / mini_batches); "
                f"Reinforcement.micro_batch_size ({self.micro_batch_size}) must divide it"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"Reinforcement.temperature is {self.temperature}; training needs a positive one"
            )
        if self.logp_source == "rescored" and self.objective.weight == "mismatch":
            raise ValueError(
                "Objective.weight='mismatch' is 1 everywhere with Reinforcement.logp_source="
                "'rescored'; say so with weight='none', or use logp_source='sampler'"
            )
        if self.logp_source == "rescored" and self.objective.clip_anchor == "rollout":
            raise ValueError(
                "Objective.clip_anchor='rollout' needs the sampler's log-probabilities, which "
                "Reinforcement.logp_source='rescored' replaces; use clip_anchor='old'"
            )

    @property
    def needs_score(self) -> bool:
        """Whether π_old needs a pass of its own."""
        return self.objective.needs_score or self.logp_source == "rescored"

    def gate(self, dtype: str) -> float:
        """Bound of max |π_θ/π_old − 1| right after `score`."""
        if self.ratio_tolerance is not None:
            return self.ratio_tolerance
        return 1e-5 if dtype == "float32" else 0.1


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy: avg@k and pass@k.

    Attributes:
      every: training steps between evaluations; the first and the last state always get one.
      problems: held-out problems, from the start of the source.
      samples: k, responses to each problem.
      temperature, top_p: of these samples.
      batch_size: responses sampled at a time.
    """

    every: int = 20
    problems: int = 200
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 400

    def __post_init__(self):
        _positive(self, "every", "problems", "samples", "batch_size")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; `data` takes what the others leave when it is -1."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run depends on.

    Attributes:
      seed: of initialisation, data order and sampling.
      model: the policy.
      data: problems, tokenizer, reward.
      cold_start: supervised training before, or None.
      init_from: weights to start from instead of a cold start: the working directory of an earlier
        run, or a Hugging Face checkpoint (then `model` is usually `@hf.read_config()`).
      reinforcement: rollouts and updates.
      evaluation: held-out accuracy.
      mesh: devices.
    """

    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=tiny)
    data: Data = Data()
    cold_start: Supervised | None = None
    init_from: str = ""
    reinforcement: Reinforcement = Reinforcement()
    evaluation: Evaluation = Evaluation()
    mesh: MeshShape = MeshShape()
