"""Prompt batches for rollouts: shuffled, endless, left-padded, split over processes."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_stable.data.sources import Problem, Source
from jaxrl_stable.data.templates import PLACE, ChatTemplate, Template, fill
from jaxrl_stable.data.tokenizer import Tokenizer, prefix_ids


def prompt_ids(problem: Problem, tokenizer: Tokenizer, template: Template = PLACE) -> list[int]:
    """Returns the token ids of one prompt.

    A plain template is filled in and preceded by BOS if the tokenizer adds one. A chat template
    writes BOS itself if the model needs it.

    Raises:
      ValueError: if the template does not contain `{prompt}` exactly once or fails to render, or if
        the problem contains a control token (`Tokenizer.control_token`). Spelling the token out
        would be safe, but prompts that were already rendered, with any template, would then pass
        unnoticed and make no sense.
    """
    turns = problem.get("messages", [])
    for text in (*(turn["content"] for turn in turns), problem["prompt"]):
        token = tokenizer.control_token(text)
        if token is not None:
            raise ValueError(
                f"the prompt contains the control token {token!r}, which only a template may "
                "write; remove it (Data.chat writes the turns of a conversation)"
            )
    if isinstance(template, ChatTemplate):
        return tokenizer.encode(template.render(problem))
    if turns:
        raise ValueError("the prompt is a list of messages; turn on Data.chat, or make it a string")
    return [*prefix_ids(tokenizer), *tokenizer.encode(fill(template, problem["prompt"]))]


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    width: int,
    template: Template = PLACE,
    names: Sequence[str] | None = None,
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Encodes prompts into an array, padded on the left so that responses start at column `width`.

    Args:
      problems: `B` problems.
      tokenizer: the tokenizer of the model.
      width: `P`, number of columns.
      template: text around `{prompt}`, or a chat template.
      names: name of each problem in error messages.

    Returns:
      tokens: int32, `pad_id` in padding.
      mask: True on tokens.

    Raises:
      ValueError: if a prompt is invalid (`prompt_ids`), is empty, or has more than `width` tokens.
        Prompts are never truncated.
    """
    tokens = np.full((len(problems), width), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(problems), width), bool)
    for row, problem in enumerate(problems):
        try:
            ids = prompt_ids(problem, tokenizer, template)
            _check_length(len(ids), width)
        except ValueError as error:
            name = names[row] if names else f"problem {row} of this batch"
            raise ValueError(f"{name}: {error}") from None
        tokens[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = True
    return tokens, mask


def check_prompts(
    source: Source, tokenizer: Tokenizer, width: int, template: Template = PLACE
) -> int:
    """Checks all prompts before a run.

    Returns:
      Length of the longest prompt in tokens.

    Raises:
      ValueError: if a prompt is invalid or does not fit. The message names the first such record,
        their number, and the width that all prompts need.
    """
    first, faulty, longest = "", 0, 0
    for i in range(len(source)):
        problem = source[i]
        try:
            length = len(prompt_ids(problem, tokenizer, template))
            longest = max(longest, length)
            _check_length(length, width)
        except ValueError as error:
            first = first or f"{source!r}[{i}]: {error}"
            faulty += 1
    if faulty:
        raise ValueError(
            f"{first} (records affected: {faulty} of {len(source)}; longest: {longest} tokens)"
        )
    return longest


def prompt_iterator(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    width: int,
    seed: int,
    template: Template = PLACE,
    held: Bool[np.ndarray, "B"] | None = None,
) -> grain.DatasetIterator:
    """Iterates forever over prompt batches. Each epoch has every prompt once, in a new order.

    All processes see the same sequence of global batches; each reads only the prompts that it
    holds. The state (`get_state`, `set_state`) is the position in that sequence. It is the same
    number in every process, so a run can resume with another number of processes. A batch may span
    two epochs.

    Args:
      source: the problems.
      tokenizer: the tokenizer of the model.
      batch_size: `B`, number of prompts in a global batch.
      width: `P`, number of columns.
      seed: seed of the shuffle, from 0 to 2**32 - 1.
      template: text around `{prompt}`, or a chat template.
      held: mask of the prompts of each batch that this process reads; all by default.

    Yields:
      A dict with:
        tokens: int32 [B, P], left-padded.
        mask: bool [B, P], True on tokens.
        problems: list of B problems.
        index: int64 [B], positions in the source.
      A prompt that is not held has only its index: its tokens are padding and its problem is None.

    Raises:
      ValueError: if the source is empty or, while iterating, if a prompt is invalid or does not fit
        `width`.
    """
    check_size(source, batch_size)
    held = np.ones(batch_size, bool) if held is None else held

    def encode(index: Int[np.ndarray, "B"]) -> dict[str, Any]:
        tokens = np.full((batch_size, width), tokenizer.pad_id, np.int32)
        mask = np.zeros((batch_size, width), bool)
        problems = [source[int(i)] if mine else None for i, mine in zip(index, held, strict=True)]
        names = [f"{source!r}[{i}]" for i in index[held]]
        known = [problem for problem in problems if problem is not None]
        tokens[held], mask[held] = encode_prompts(known, tokenizer, width, template, names)
        return {"tokens": tokens, "mask": mask, "problems": problems, "index": index}

    batches = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat().batch(batch_size)
    # One thread: problem generators need not be thread-safe. Prefetching two batches hides slow
    # ones.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.map(encode).to_iter_dataset(options))


def check_size(source: Source, batch_size: int) -> None:
    """Checks that a source can fill batches of this size.

    Raises:
      ValueError: if the source is empty or `batch_size` is below 1.
    """
    if len(source) == 0:
        raise ValueError(f"{source!r} is empty; give a source with problems")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1")


def _check_length(length: int, width: int) -> None:
    if length == 0:
        raise ValueError("the prompt has no tokens; remove the record or use a template with text")
    if length > width:
        raise ValueError(
            f"the prompt has {length} tokens, more than the prompt width of {width}; "
            "increase the width or remove the record"
        )
