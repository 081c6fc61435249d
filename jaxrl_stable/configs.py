"""An experiment as frozen dataclasses that gin binds. One gin file is one experiment.

The library has no gin decorators; gin files import this module (dynamic registration) and bind
fields, for example `configs.Objective.replay = "R3"`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from jaxrl_stable.advantages import check_group_size, check_penalty
from jaxrl_stable.checks import expand_paths, field_types, one_of, positive, sources, within
from jaxrl_stable.model.config import ModelConfig, tiny
from jaxrl_stable.objective import Objective
from jaxrl_stable.sharding import BATCH, ROWS, MeshShape

MOMENT_DTYPES = ("float32", "bfloat16")
MAX_SEED = 2**32 - 1  # of grain's shuffle
RANKING = ("reward", "avg_at_k", "pass_at_k")
FORMATS = ("none", "int8", "int4", "fp8", "int8_w8a8", "fp8_w8a8")  # see `quantize`


@dataclasses.dataclass(frozen=True)
class Data:
    """Problems, tokenizer and reward.

    Attributes:
      train: source of training problems: path of a JSONL file, a list of paths, or an object
        (`data.ReasoningGymSource`, …).
      heldout: source of held-out problems, likewise.
      tokenizer: path of a SentencePiece model or of a Hugging Face `tokenizer.json`. If empty, the
        tokenizer of `Experiment.init_from`, or else a SentencePiece model that is trained on the
        problems and kept in the working directory.
      vocab_size: size of the tokenizer that is trained on the problems.
      template: text around a problem; "{prompt}" is replaced by the problem.
      chat: whether that text becomes a user message in the tokenizer's own chat template.
      system: system message of the chat, if any.
      chat_variables: further variables of the chat template, such as `{"enable_thinking": False}`.
      prompt_width: P, longest prompt in tokens.
      reward: "numeric", "exact", "math", or "package.module:function".
      reward_special_tokens: whether the reward sees the special tokens of a response, such as the
        marks of a tool call. The stop token is removed in either case.
      reward_timeout: time limit per response, in seconds, for a reward in a worker process.
      reward_workers: number of worker processes.
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
    reward_special_tokens: bool = False
    reward_timeout: float = 5.0
    reward_workers: int = 1

    def __post_init__(self):
        field_types(self)
        sources(self, "train", "heldout")
        expand_paths(self, "train", "heldout", "tokenizer")
        positive(self, "vocab_size", "prompt_width", "reward_workers")
        within(self, "reward_timeout", above=0)
        for field in ("system", "chat_variables"):
            if getattr(self, field) and not self.chat:
                raise ValueError(f"Data.{field} is for chats; set Data.chat = True, or remove it")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and clipping by global norm.

    Attributes:
      learning_rate: rate after the warm-up.
      warmup_steps: gradient steps from 0 to the full rate.
      decay_steps: gradient steps over which a cosine decays the rate to a tenth; 0 keeps it
        constant.
      b1, b2, eps: Adam's constants.
      weight_decay: decoupled weight decay of matrices; vectors such as norm scales have none.
      clip_norm: largest global norm of a gradient.
      master_weights: whether to keep float32 weights if parameters have a narrower dtype
        (`ModelConfig.param_dtype`). False saves that memory and loses updates below the spacing of
        the stored dtype.
      first_moment_dtype: dtype of Adam's first moment; the second is float32.
      skip_zero_gradients: whether a step whose gradient is exactly 0 leaves weights, moments and
        schedule as they are. False is usual in the field: Adam's momentum and the weight decay
        still move the weights, by most of the last step at first (b1 = 0.9), although no response
        taught anything. `gradient/zero_share` counts such steps either way.
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    master_weights: bool = True
    first_moment_dtype: str = "float32"
    skip_zero_gradients: bool = False

    def __post_init__(self):
        field_types(self)
        one_of(self, "first_moment_dtype", MOMENT_DTYPES)
        within(self, "learning_rate", "warmup_steps", "decay_steps", "weight_decay", at_least=0)
        within(self, "b1", "b2", at_least=0, below=1)
        within(self, "eps", "clip_norm", above=0)


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Cold start: supervised training on prompt-answer pairs, packed.

    Attributes:
      demonstrations: source of prompt-answer pairs, like `Data.train`; the training problems by
        default.
      steps: gradient steps.
      batch_size: packed rows per step.
      length: tokens per row.
      optimizer: learning rate and other settings of AdamW.
      checkpoint_every: steps between checkpoints.
    """

    demonstrations: Any = None
    steps: int = 1000
    batch_size: int = 32
    length: int = 256
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_steps=50)
    checkpoint_every: int = 200

    def __post_init__(self):
        field_types(self)
        sources(self, "demonstrations")
        expand_paths(self, "demonstrations")
        within(self, "steps", at_least=0)
        positive(self, "batch_size", "length", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Reinforcement:
    """Rollouts and updates.

    Attributes:
      steps: number of rollouts ("global steps"); each makes `objective.mini_batches` gradient
        steps.
      prompts: prompts per rollout batch.
      group_size: responses per prompt; at least 2 if the group is the baseline of
        `objective.advantages`.
      max_tokens: longest response, EOS included.
      overlong_buffer: share of `max_tokens`, at its end, over which the reward falls linearly by 1
        (DAPO's soft punishment, see `rewards.overlong_penalty`); 0 leaves the reward unchanged.
        Estimators that read the reward as a score refuse it (`advantages.maxrl`) or take it apart
        from the score (`advantages.gpg`).
      overlong_filter: whether responses cut at the limit get advantage 0. They still count in the
        baseline and in the denominators.
      max_rounds: largest number of rollouts per step, drawn until each group is informative
        (DAPO's dynamic sampling, see `run.dynamic_sampling`); 1 takes the first rollout as it is.
      temperature: temperature of the sampler, and hence of the policy that is trained.
      top_k, top_p: see `sampler.rollout.Sampling`; values other than 0 and 1 bias the gradient.
      rollout_format: number format of the sampler: "none" (the policy itself); weights in "int8",
        "int4" or "fp8"; or activations too, "int8_w8a8" or "fp8_w8a8". See `quantize`.
      rollout_rows: responses sampled at a time, which bounds the memory for keys and values; all
        responses of a step by default.
      rollout_cache: whether the sampler keeps keys and values of past tokens. False reruns the
        training program over the whole row for each token, for a mismatch of exactly 0. It is slow
        and meant for controlled experiments and debugging; see `sampler.uncached`.
      objective: loss, corrections and replay.
      optimizer: learning rate and other settings of AdamW.
      micro_batch_size: rows of one forward and backward pass.
      packed: whether `score` and `update` put several responses, with their prompts, into one row
        of prompt_width + max_tokens columns. Results are the same; the time falls roughly to the
        share of columns that hold tokens (`packing/columns_share`). See `packing`.
      ratio_tolerance: bound of max |π_θ/π_old − 1| in the first mini-batch after a start; by
        default 1e-5 in float32 and 0.1 in half precision.
      max_skipped: consecutive non-finite gradients after which the run stops.
      max_failed_rewards: share of a rollout's responses whose reward may time out or fail before
        the run stops. An evaluation with a larger share has no score.
      checkpoint_every: steps between checkpoints; every evaluated state is saved too.
      keep_checkpoints: number of newest checkpoints to keep, in addition to the best one.
      show_every: steps between samples that are shown and stored.
    """

    steps: int = 100
    prompts: int = 32
    group_size: int = 8
    max_tokens: int = 32
    overlong_buffer: float = 0.0
    overlong_filter: bool = False
    max_rounds: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rollout_format: str = "int8"
    rollout_rows: int | None = None
    rollout_cache: bool = True
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    micro_batch_size: int = 64
    packed: bool = False
    ratio_tolerance: float | None = None
    max_skipped: int = 10
    max_failed_rewards: float = 0.1
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    show_every: int = 10

    def __post_init__(self):
        field_types(self)
        one_of(self, "rollout_format", FORMATS)
        within(self, "steps", "top_k", "ratio_tolerance", at_least=0)
        within(self, "top_p", above=0, at_most=1)
        within(self, "max_failed_rewards", at_least=0, at_most=1)
        positive(self, "prompts", "group_size", "max_tokens", "micro_batch_size", "max_skipped")
        positive(self, "checkpoint_every", "keep_checkpoints", "show_every", "max_rounds")
        if not 0 <= self.overlong_buffer <= 1:
            raise ValueError(
                f"Reinforcement.overlong_buffer is {self.overlong_buffer}; it is a share of "
                "max_tokens, use 0 to 1"
            )
        if self.overlong_buffer:
            check_penalty(self.objective.advantages, "Reinforcement.overlong_buffer")
        check_group_size(self.objective.advantages, self.group_size, "Reinforcement.group_size")
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
        if self.rollout_rows is not None and (self.rollout_rows < 1 or rows % self.rollout_rows):
            raise ValueError(
                f"Reinforcement.rollout_rows is {self.rollout_rows}; it must divide the {rows} "
                "rows of a step (prompts × group_size)"
            )
        if self.packed and not self.rollout_cache:
            raise ValueError(
                "Reinforcement.rollout_cache = False samples in padded rows, and packed rows round "
                "differently; set packed = False, or rollout_cache = True"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"Reinforcement.temperature is {self.temperature}; training needs a positive value"
            )

    @property
    def resolved_objective(self) -> Objective:
        """The objective with `horizon` resolved: its own value if set, else `max_tokens`."""
        horizon = self.objective.horizon
        return dataclasses.replace(
            self.objective, horizon=float(self.max_tokens) if horizon is None else horizon
        )

    def gate(self, dtype: str) -> float:
        """Returns the bound of max |π_θ/π_old − 1| right after `score`."""
        if self.ratio_tolerance is not None:
            return self.ratio_tolerance
        return 1e-5 if dtype == "float32" else 0.1


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out reward and accuracy: avg@k and pass@k.

    Attributes:
      every: training steps between evaluations; the first and the last state are always evaluated.
      problems: number of held-out problems, from the start of the source.
      samples: k, responses per problem.
      temperature, top_k, top_p: sampling settings of the evaluation.
      max_tokens: longest response, EOS included; `Reinforcement.max_tokens` by default.
      batch_size: responses sampled at a time.
      best: metric that ranks checkpoints: "reward", the mean held-out reward; "avg_at_k"; or
        "pass_at_k".
    """

    every: int = 20
    problems: int = 200
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 400
    top_k: int = 0
    max_tokens: int | None = None
    best: str = "reward"

    def __post_init__(self):
        field_types(self)
        positive(self, "every", "problems", "samples", "batch_size", "max_tokens")
        within(self, "temperature", "top_k", at_least=0)
        within(self, "top_p", above=0, at_most=1)
        one_of(self, "best", RANKING)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run depends on.

    Attributes:
      seed: seed of initialisation, data order and sampling.
      model: sizes of the policy.
      data: problems, tokenizer and reward.
      cold_start: supervised training before reinforcement, if any; it starts from the weights of
        `init_from` if both are set.
      init_from: weights to start from instead of random ones: the working directory of an earlier
        run, or a Hugging Face checkpoint (then `model` is usually `@hf.read_config()`). They are
        read once: the run keeps what it needs of them.
      reinforcement: rollouts and updates.
      evaluation: held-out accuracy.
      mesh: shape of the device mesh.
      wandb_project: Weights & Biases project that gets a copy of all scalars, in one wandb run per
        working directory; "" = off. Needs the extra `wandb`. Has no effect on what a run computes,
        so a resumed run may change it.
    """

    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=tiny)
    data: Data = Data()
    cold_start: Supervised | None = None
    init_from: str = ""
    reinforcement: Reinforcement = Reinforcement()
    evaluation: Evaluation = Evaluation()
    mesh: MeshShape = MeshShape()
    wandb_project: str = ""

    def __post_init__(self):
        field_types(self)
        expand_paths(self, "init_from")
        within(self, "seed", at_least=0, at_most=MAX_SEED)
        if self.reinforcement.packed and self.mesh.context > 1:
            raise ValueError(
                f"Reinforcement.packed needs all columns of a row on one device, but "
                f"MeshShape.context is {self.mesh.context}; set it to 1, or packed = False"
            )
        self._check_context()

    def _check_context(self) -> None:
        context, width = self.model.max_positions, self.data.prompt_width
        limits = {
            "Reinforcement.max_tokens": self.reinforcement.max_tokens,
            "Evaluation.max_tokens": self.evaluation.max_tokens or 0,
        }
        for field, limit in limits.items():
            if context and width + limit > context:
                raise ValueError(
                    f"Data.prompt_width + {field} is {width} + {limit} = {width + limit}, but the "
                    f"model was trained for {context} positions (ModelConfig.max_positions); lower "
                    "one of them, or set max_positions (hf.read_config.max_positions) if you know "
                    "that the model works beyond it, 0 to allow any length"
                )

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        """Checks that rows and columns of every batch divide evenly over the mesh.

        Raises:
          ValueError: if not; names the field and the number that it must be a multiple of.
        """
        rl = self.reinforcement
        batch, rows = (math.prod(mesh.shape[a] for a in axes) for axes in (BATCH, ROWS))
        context = mesh.shape["context"]
        needs = {
            "Reinforcement.micro_batch_size": (rl.micro_batch_size, batch),
            "Reinforcement.prompts × group_size": (rl.prompts * rl.group_size, rows),
        }
        if rl.rollout_rows is not None:
            needs["Reinforcement.rollout_rows"] = (rl.rollout_rows, rows)
        columns = self.data.prompt_width + rl.max_tokens
        needs["Data.prompt_width + Reinforcement.max_tokens"] = (columns, context)
        if self.evaluation.max_tokens is not None:
            columns = self.data.prompt_width + self.evaluation.max_tokens
            needs["Data.prompt_width + Evaluation.max_tokens"] = (columns, context)
        if self.cold_start is not None:
            needs["Supervised.batch_size"] = (self.cold_start.batch_size, rows)
            needs["Supervised.length"] = (self.cold_start.length, context)
        if self.model.num_experts:
            needs["ModelConfig.num_experts"] = (self.model.num_experts, mesh.shape["expert"])
        for field, (size, parts) in needs.items():
            if size % parts:
                raise ValueError(
                    f"{field} is {size}; on this mesh ({dict(mesh.shape)}) it must be a multiple "
                    f"of {parts}, or devices would idle"
                )
