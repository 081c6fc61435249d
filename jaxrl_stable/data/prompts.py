"""Prompt batches for rollouts: shuffled, endless, left-padded, each process its own rows."""

from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Bool

from jaxrl_stable.data.sources import Problem, Source
from jaxrl_stable.data.templates import PLACE, ChatTemplate, Template, fill
from jaxrl_stable.data.tokenizer import Tokenizer


def prompt_ids(problem: Problem, tokenizer: Tokenizer, template: Template = PLACE) -> list[int]:
    """Returns the ids of one prompt.

    A text around `{prompt}` is filled in, and has BOS in front where the tokenizer has one. A chat
    template writes BOS itself, or means none.

    Raises:
      ValueError: the template does not contain `{prompt}` exactly once, or fails; or the problem
        has a control token (`Tokenizer.control_token`). Spelled out, that would do no harm; but
        prompts that were rendered before, for any template, would pass and make no sense.
    """
    turns = problem.get("messages", [])
    for text in (*(turn["content"] for turn in turns), problem["prompt"]):
        token = tokenizer.control_token(text)
        if token is not None:
            raise ValueError(
                f"the prompt contains the control token {token!r}, which only a template may "
                "write; take it out (Data.chat writes the turns of a conversation)"
            )
    if isinstance(template, ChatTemplate):
        return tokenizer.encode(template.render(problem))
    if turns:
        raise ValueError("the prompt is a list of messages; turn Data.chat on, or make it a string")
    ids = tokenizer.encode(fill(template, problem["prompt"]))
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    width: int,
    template: Template = PLACE,
    names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes prompts into an array, padded on the left so that responses start at column `width`.

    Args:
      problems: `B` problems.
      tokenizer: what to encode with.
      width: `P`, the number of columns.
      template: text around `{prompt}`, or a chat template.
      names: what an error calls each problem.

    Returns:
      tokens: int32 [B, P], `pad_id` where there is none.
      mask: bool [B, P], True on tokens.

    Raises:
      ValueError: a prompt is faulty (`prompt_ids`), has more than `width` tokens (nothing is ever
        cut off) or none at all.
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
    """Checks all prompts before a run, and returns the longest one's number of tokens.

    Raises:
      ValueError: names the first record that is faulty or does not fit, how many do not, and the
        width that all need.
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
    """Iterates for ever over prompt batches; each epoch has every prompt once, in its own order.

    All processes see the same sequence of global batches, and each reads the prompts that it holds.
    The state (`get_state`, `set_state`) is the position in that sequence, the same number in every
    process, so that a run may resume with another number of processes. A batch may span two epochs.

    Args:
      source: the problems.
      tokenizer: what to encode with.
      batch_size: `B`, number of prompts in a global batch.
      width: `P`, the number of columns.
      seed: of the shuffle, from 0 to 2**32 - 1.
      template: text around `{prompt}`, or a chat template.
      held: which prompts of each batch this process reads; all by default.

    Yields:
      `tokens` int32 [B, P], left-padded; `mask` bool [B, P], True on tokens; `problems`, a list of
      B; `index` int64 [B], positions in the source. Of a prompt that is not held there is the index
      alone: nothing but padding, and None for the problem.

    Raises:
      ValueError: the source is empty, or (while iterating) a prompt is faulty or does not fit
        `width`.
    """
    check_size(source, batch_size)
    held = np.ones(batch_size, bool) if held is None else held

    def encode(index: np.ndarray) -> dict:
        tokens = np.full((batch_size, width), tokenizer.pad_id, np.int32)
        mask = np.zeros((batch_size, width), bool)
        problems = [source[int(i)] if mine else None for i, mine in zip(index, held, strict=True)]
        names = [f"{source!r}[{i}]" for i in index[held]]
        known = [problem for problem in problems if problem is not None]
        tokens[held], mask[held] = encode_prompts(known, tokenizer, width, template, names)
        return {"tokens": tokens, "mask": mask, "problems": problems, "index": index}

    batches = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat().batch(batch_size)
    # One thread: generators of problems need not be thread-safe. Two batches ahead hide slow ones.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.map(encode).to_iter_dataset(options))


def check_size(source: Source, batch_size: int) -> None:
    """ValueError where there are no batches of this size."""
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
            "widen it or remove the record"
        )
