"""TRL's side of the comparison: its own code on given log-probabilities; no model runs.

From the sampler's tokens to the loss everything is TRL's, except for calls of a model.
"""

import asyncio
import collections
import contextlib
import os
import types
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # a warning
import torch
import trl
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.rewards import get_soft_overlong_punishment

from tests.objectives.trl_cases import (
    EOS,
    GROUP,
    LENGTHS,
    METRICS,
    PAD,
    ROWS,
    WEIGHTS,
    WIDTH,
    WORD,
    Advantage,
    Batch,
    Loss,
)
from tests.objectives.trl_ours import stack


def their_losses(case: Loss, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Returns the same results from TRL."""
    return stack(_their_loss(case, batch) for batch in batches)


def _their_loss(case: Loss, batch: Batch) -> dict[str, np.ndarray]:
    logp = torch.tensor(batch.logp, requires_grad=True)
    trainer = make_trainer(case.trainer, case.trl, updates=1 + case.off_policy)
    trainer.given = Given(batch, logp, case.off_policy, case.tools)
    if case.trainer == "AsyncGRPO":
        output = types.SimpleNamespace(log_probs=logp, entropy=torch.zeros_like(logp))
        loss = trainer.compute_loss(lambda **_: output, _flat(batch))
    else:
        advantages = batch.token_advantages if case.token_advantages else batch.advantages
        with _float64():
            inputs = trainer.score() | dict(advantages=torch.tensor(advantages))
            loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    logged = trainer._metrics["train"]
    metrics = {key: np.asarray(logged[key][-1]) for key in METRICS if key in logged}
    return dict(loss=loss.detach().numpy(), gradient=logp.grad.numpy(), **metrics)


def their_advantages(case: Advantage, batches: Iterable[Batch]) -> np.ndarray:
    return np.stack([_their_advantages(case, batch) for batch in batches])


def _their_advantages(case: Advantage, batch: Batch) -> np.ndarray:
    if not case.all_scored:
        batch = batch._replace(rewards=np.where(batch.scored[:, None], batch.rewards, np.nan))
    if case.trainer == "AsyncGRPO":
        return np.concatenate(
            [_asynchronous_group(x) for x in np.split(batch.rewards, ROWS // GROUP)]
        )
    trainer = make_trainer(case.trainer, case.trl)
    trainer.given = Given(batch, torch.tensor(batch.logp))
    with _float64():
        return trainer.score()["advantages"].numpy()


def their_penalties(limit: int, buffer: int) -> np.ndarray:
    punish = get_soft_overlong_punishment(limit, buffer)
    return np.array(punish(completion_ids=[[WORD] * n for n in LENGTHS]))


@contextlib.contextmanager
def _float64():
    """Sets the precision of tensors that TRL makes from Python numbers."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class Given(NamedTuple):
    """Returns what a trainer would sample and compute with its models."""

    batch: Batch
    logp: "torch.Tensor"
    off_policy: bool = True
    tools: bool = False


class GivenLogProbs:
    """Makes a TRL trainer for one step on `given`, without model, tokenizer, rewards, processes."""

    def __init__(self, config):
        vars(self).update(vars(config))
        same = lambda x, *_, **__: x  # noqa: E731
        self.args = config
        self.model = types.SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.ref_model = types.SimpleNamespace()
        self.accelerator = types.SimpleNamespace(
            device="cpu", num_processes=1, process_index=0, gather=same, reduce=same
        )
        self.current_gradient_accumulation_steps = 1
        self.epsilon_low = config.epsilon
        self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.environment_factories = self.environments = self.tools = None
        self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self._tokenizer = types.SimpleNamespace(pad_token_id=PAD)
        self.eos_token_ids = [EOS]
        self.reward_funcs = self.reward_func_names = ["first", "second"]
        self.reward_weights = torch.tensor(WEIGHTS, dtype=torch.float64)
        self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
        self._logs = collections.defaultdict(list, rewards=collections.defaultdict(list))
        self._pending_extra_logs, self._pending_metrics = {}, {}
        self._step_forward_tokens = self._step_trained_tokens = self._step_samples = 0
        self._step_seq_len_weighted = self._step_forward_s = 0

    def score(self) -> dict:
        """Returns what TRL computes between sampling and the loss: masks, advantages, weights."""
        return self._generate_and_score_completions([{"prompt": ""}] * ROWS)

    def _generate(self, prompts):
        batch = self.given.batch
        ends = np.where(batch.finished, EOS, WORD)
        tokens = [[WORD] * (n - 1) + [int(end)] for n, end in zip(batch.lengths, ends)]
        start = [[WORD]] * ROWS
        if isinstance(self, trl.RLOOTrainer):
            return start, tokens, [""] * ROWS
        logps, spoken = (
            [row[:n].tolist() for row, n in zip(rows, batch.lengths)]
            for rows in (batch.rollout, batch.spoken.astype(int))
        )
        logps, spoken = logps if self.use_vllm else None, spoken if self.given.tools else None
        return start, tokens, spoken, [""] * ROWS, logps, {}, None, None

    def _calculate_rewards(self, *_):
        return torch.tensor(self.given.batch.rewards)

    def _get_per_token_logps_and_entropies(self, model, *_, **__):
        if torch.is_grad_enabled():
            logp = self.given.logp
        elif model is self.ref_model:
            logp = torch.tensor(self.given.batch.reference)
        elif self.given.off_policy:
            logp = torch.tensor(self.given.batch.old)
        else:
            logp = self.given.logp.detach()
        return logp, torch.zeros_like(logp), None


def make_trainer(name: str, settings: dict[str, Any], updates: int = 2):
    """With more than one update, TRL computes log π_old."""
    config, base = {
        "GRPO": (trl.GRPOConfig, trl.GRPOTrainer),
        "GMPO": (GMPOConfig, GMPOTrainer),
        "RLOO": (trl.RLOOConfig, trl.RLOOTrainer),
        "AsyncGRPO": (AsyncGRPOConfig, AsyncGRPOTrainer),
    }[name]
    settings = dict(num_generations=GROUP, **settings)
    if name != "AsyncGRPO":
        settings["num_iterations"] = updates
    with warnings.catch_warnings(action="ignore"):  # about names that transformers deprecates
        config = config(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=ROWS,
            **settings,
        )
    return type(name, (GivenLogProbs, base), {})(config)


def _flat(batch: Batch) -> dict:
    """Returns the batch as the asynchronous trainer packs it: all tokens in one row."""
    row = lambda x: torch.tensor(np.broadcast_to(x, (ROWS, WIDTH)).reshape(1, -1))  # noqa: E731
    index = np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH)
    count, one = torch.tensor([batch.mask.sum()]), torch.ones(1, 1, dtype=int)
    zeros = dict.fromkeys(("input_ids", "position_ids", "shift_labels"), row(0))
    tree = dict.fromkeys(("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k"), one)
    return dict(
        zeros,
        attention_mask=row(1),
        token_index=row(np.where(batch.mask, index, -1)),
        old_log_probs=row(batch.old),
        advantages=row(batch.advantages[:, None]),
        segment_id=row(np.arange(ROWS)[:, None]),
        tree_max_seqlens=torch.ones(1, 2, dtype=int),
        global_n_tokens=count,
        global_n_forward_tokens=count,
        mean_seq_len=count / ROWS,
        **tree,
    )


def _asynchronous_group(rewards: np.ndarray) -> np.ndarray:
    """Returns a group's advantages as the asynchronous trainer's sampling process computes them."""
    columns = [[None if np.isnan(x) else float(x) for x in column] for column in rewards.T]
    sampler = types.SimpleNamespace(
        reward_funcs=[lambda column=column, **_: column for column in columns],
        reward_func_names=["first", "second"],
        _env_reward_types=[],
        _provides_rollout_reward=False,
    )
    sequence = types.SimpleNamespace(input_ids=[WORD], completion_mask=[1], old_log_probs=[0.0])
    same = dict.fromkeys(("prompts", "completions", "completions_ids"), [""] * GROUP)
    group = types.SimpleNamespace(
        **same,
        completions_sequences=[[sequence]] * GROUP,
        reward_kwargs={},
        tool_call_counts=[0],
        tool_failure_counts=[0],
        model_version=0,
        group_id=0,
    )
    samples = asyncio.run(_AsyncRolloutLoop._score_group(sampler, group))
    return np.array([sample.advantage for sample in samples])
