"""Task: problems, tokenizer and reward of an experiment, checked before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zlib
from functools import partial

from jaxrl_stable import distributed
from jaxrl_stable.checks import record_name
from jaxrl_stable.configs import Experiment
from jaxrl_stable.data import (
    Ending,
    Source,
    Template,
    Tokenizer,
    check_demonstrations,
    check_prompts,
    ending,
    load_chat_template,
    load_tokenizer,
    open_source,
    overlap,
    train_sentencepiece,
)
from jaxrl_stable.data.records import check_characters
from jaxrl_stable.data.sources import Remembered
from jaxrl_stable.data.tokenizer import special_tokens
from jaxrl_stable.rewards import Reward, check_references, load_reward, try_reward
from jaxrl_stable.run.origin import find_tokenizer, has_started, keep_files
from jaxrl_stable.sampler.rollout import Sampling

TOKENIZER_PROBLEMS = 20_000  # read per source to train a tokenizer


@dataclasses.dataclass(frozen=True)
class Task:
    """Problems, tokenizer and reward. A context manager that closes the reward.

    Attributes:
      train: training problems.
      heldout: held-out problems.
      tokenizer: text to ids and back.
      reward: scores responses.
      identity: identifies problems, tokenizer and chat template; compared when a run resumes.
      template: turns a problem into a prompt.
      special_tokens: whether the reward sees special tokens; never the stop token.
      demonstrations: source of the cold start, if `load_task` opened it.
    """

    train: Source
    heldout: Source
    tokenizer: Tokenizer
    reward: Reward
    identity: str = ""
    template: Template = "{prompt}"
    special_tokens: bool = False
    demonstrations: Source | None = None

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_: object) -> None:
        self.reward.close()

    @functools.cached_property
    def ending(self) -> Ending:
        """How responses end: at EOS, or where the chat template ends a turn."""
        return ending(self.tokenizer, self.template)

    def decode(self, tokens, response_mask) -> list[str]:
        """Returns the text of each response, without its stop token."""
        stop = set(self.ending.stop_ids)
        decode = self.tokenizer.decode
        if self.special_tokens:
            decode = partial(decode, special_tokens=True)
        return [
            decode([int(t) for t in row[mask] if int(t) not in stop])
            for row, mask in zip(tokens, response_mask, strict=True)
        ]

    def sampling(
        self, max_tokens: int, temperature: float, top_k: int = 0, top_p: float = 1.0
    ) -> Sampling:
        """Returns sampling settings with this tokenizer's stop tokens."""
        tokenizer = self.tokenizer
        return Sampling(
            max_tokens, temperature, top_k, top_p, self.ending.stop_ids, tokenizer.pad_id
        )


def load_task(
    experiment: Experiment, workdir: str | pathlib.Path, cold_start: bool = False
) -> Task:
    """Loads and checks problems, tokenizer and reward, and prints what a user should know of them.

    A run that has started reads the tokenizer and chat template that it keeps (`run.origin`).

    Every record is read and encoded, so that a faulty one ends a run at its start. Per 10,000
    records of 60 words, this takes about 4 s with Qwen's tokenizer on two cores (twice that with
    demonstrations of 170 words) and 1 s with SentencePiece.

    Args:
      experiment: the experiment.
      workdir: directory of the run.
      cold_start: whether the cold start's demonstrations are opened and checked too.

    Raises:
      ValueError, FileNotFoundError: if a source or the chat template is missing, a prompt or a
        demonstration is invalid or too long, a reference answer cannot be read, the reward fails on
        a problem, or the tokenizer has more entries than the model; the error says where.
    """
    data, evaluation = experiment.data, experiment.evaluation
    for field in ("train", "heldout"):
        if getattr(data, field) is None:
            raise ValueError(
                f"Data.{field} is missing; bind it to a source of problems, for example the path "
                "of a JSONL file"
            )
    train, heldout = open_source(data.train), open_source(data.heldout)
    if evaluation.problems > len(heldout):
        raise ValueError(
            f"Evaluation.problems is {evaluation.problems} but {heldout!r} has {len(heldout)}; "
            "lower it, or give a larger held-out set"
        )
    workdir = pathlib.Path(workdir)
    path = find_tokenizer(experiment, workdir)
    template: Template = data.template
    if data.chat:
        template = load_chat_template(
            path, words=data.template, system=data.system, variables=data.chat_variables
        )
    tokenizer = _open_tokenizer(experiment, (train, heldout), path, workdir)
    demonstrations = None
    if cold_start and experiment.cold_start is not None:
        given = experiment.cold_start.demonstrations
        demonstrations = train if given is None else open_source(given)
    seen = Remembered(train), Remembered(heldout)  # several checks, one generation
    _check_records(experiment, seen, demonstrations, tokenizer, template)
    identity = f"{train!r}, tokenizer {_checksum(path):08x}, template {template!r}"
    reward = load_reward(data.reward, timeout_s=data.reward_timeout, workers=data.reward_workers)
    try:
        try_reward(reward, train[0])
    except BaseException:
        reward.close()
        raise
    if distributed.is_main() and not has_started(workdir):
        keep_files(experiment, path, workdir)
    task = Task(
        train,
        heldout,
        tokenizer,
        reward,
        identity,
        template,
        data.reward_special_tokens,
        demonstrations,
    )
    if distributed.is_main():
        for note in (task.ending.note, overlap(*seen, evaluation.problems)):
            if note:
                print(note, flush=True)
    return task


def _open_tokenizer(
    experiment: Experiment,
    sources: tuple[Source, Source],
    path: pathlib.Path,
    workdir: pathlib.Path,
) -> Tokenizer:
    """Opens the tokenizer at a path; first trains it if it is this run's own and does not exist."""
    if path == workdir / "tokenizer.model" and distributed.is_main() and not path.exists():
        _train_tokenizer(experiment, sources, path)
    distributed.wait_for_all("tokenizer")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > experiment.model.vocab_size:
        raise ValueError(
            f"tokenizer {path} has {tokenizer.vocab_size} entries but ModelConfig.vocab_size is "
            f"{experiment.model.vocab_size}; raise it, or use another tokenizer"
        )
    return tokenizer


def _check_records(
    experiment: Experiment,
    problems: tuple[Remembered, Remembered],
    demonstrations: Source | None,
    tokenizer: Tokenizer,
    template: Template,
) -> None:
    """Checks all prompts, reference answers and demonstrations."""
    data = experiment.data
    for source in problems:
        check_prompts(source, tokenizer, data.prompt_width, template)
        check_references(source, data.reward)
    if demonstrations is not None:
        supervised = experiment.cold_start
        checked = problems[0] if supervised.demonstrations is None else demonstrations
        context = experiment.model.max_positions
        check_demonstrations(checked, tokenizer, supervised.length, template, context)


def _checksum(path: pathlib.Path) -> int:
    """Returns the checksum of a tokenizer and of the files that name its special tokens."""
    directory = path if path.is_dir() else path.parent
    names = ["tokenizer_config.json", "generation_config.json"]
    files = [directory / name for name in (*names, "tokenizer.json", "tokenizer.model")]
    if not path.is_dir():
        files = [path, *files[:2]]
    model, fields = directory / "tokenizer.json", ("eos_token", "pad_token")
    both, one = special_tokens(model), special_tokens(model, overridden=False)
    # Earlier versions ignored this file, so it counts only if it changes something.
    if model in files and any(both.get(field) != one.get(field) for field in fields):
        files.append(directory / "special_tokens_map.json")
    return zlib.crc32(b"".join(file.read_bytes() for file in files if file.exists()))


def _train_tokenizer(
    experiment: Experiment, sources: tuple[Source, Source], path: pathlib.Path
) -> None:
    """Trains on problems and demonstrations, so that the tokenizer knows all their characters."""
    data, cold_start = experiment.data, experiment.cold_start
    if cold_start is not None and cold_start.demonstrations is not None:
        sources = (*sources, open_source(cold_start.demonstrations))
    texts = [data.template]
    for source in sources:
        for i in range(min(len(source), TOKENIZER_PROBLEMS)):
            problem = source[i]
            try:
                check_characters(problem)
            except ValueError as error:
                raise ValueError(f"{record_name(source, i)}: {error}") from None
            texts += (problem["prompt"], problem["answer"])
    train_sentencepiece(texts, path, data.vocab_size)
