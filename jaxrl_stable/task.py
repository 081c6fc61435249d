"""The task of an experiment: problems, tokenizer and reward, checked before anything runs."""

from __future__ import annotations

import dataclasses
import pathlib

from jaxrl_stable.configs import Experiment
from jaxrl_stable.data import (
    JsonlSource,
    Problem,
    Source,
    Tokenizer,
    check_prompts,
    load_tokenizer,
    train_sentencepiece,
)
from jaxrl_stable.rewards import Reward, check_references, load_reward
from jaxrl_stable.rollout import Sampling


@dataclasses.dataclass(frozen=True)
class Task:
    """What the policy is trained on.

    Attributes:
      train: training problems.
      heldout: held-out problems.
      tokenizer: text to ids and back.
      reward: scores responses; closed with the task.
    """

    train: Source
    heldout: Source
    tokenizer: Tokenizer
    reward: Reward

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_: object) -> None:
        self.reward.close()

    def decode(self, tokens, response_mask) -> list[str]:
        """Text of each response, without its stop token."""
        stop = set(self.tokenizer.eos_ids)
        return [
            self.tokenizer.decode([int(t) for t in row[mask] if int(t) not in stop])
            for row, mask in zip(tokens, response_mask, strict=True)
        ]

    def sampling(
        self, max_tokens: int, temperature: float, top_k: int = 0, top_p: float = 1.0
    ) -> Sampling:
        """Sampling that ends with this tokenizer's stop tokens."""
        tokenizer = self.tokenizer
        return Sampling(
            max_tokens, temperature, top_k, top_p, tuple(tokenizer.eos_ids), tokenizer.pad_id
        )


def load_task(experiment: Experiment, workdir: str) -> Task:
    """Loads and checks problems, tokenizer and reward.

    Raises:
      ValueError, FileNotFoundError: a source is missing, a prompt does not fit, a reference answer
        cannot be read, or the tokenizer has more entries than the model; each says where.
    """
    data = experiment.data
    for field in ("train", "heldout"):
        if getattr(data, field) is None:
            raise ValueError(
                f"Data.{field} is missing; bind it to a source of problems, for example the path "
                "of a JSONL file"
            )
    train, heldout = open_source(data.train), open_source(data.heldout)
    path = pathlib.Path(data.tokenizer or pathlib.Path(workdir) / "tokenizer.model")
    if not data.tokenizer and not path.exists():
        texts = [text for problem in _all(train) for text in (problem["prompt"], problem["answer"])]
        train_sentencepiece(texts, path, data.vocab_size)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"tokenizer {path} has {tokenizer.vocab_size} entries but ModelConfig.vocab_size is "
            f"{experiment.model.vocab_size}; raise it, or use another tokenizer"
        )
    for source in (train, heldout):
        check_prompts(source, tokenizer, data.prompt_width, data.template)
        check_references(source, data.reward)
    reward = load_reward(data.reward, timeout_s=data.reward_timeout)
    return Task(train, heldout, tokenizer, reward)


def open_source(source: Source | str) -> Source:
    """A source as it is, or the JSONL file that a path names."""
    return JsonlSource(source) if isinstance(source, str) else source


def _all(source: Source) -> list[Problem]:
    return [source[i] for i in range(len(source))]
