"""Prompt batches for rollouts: shuffled, endless, left-padded, sharded over processes."""

from collections.abc import Sequence

import grain
import numpy as np

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
    process_index: int = 0,
    process_count: int = 1,
    template: Template = PLACE,
) -> grain.DatasetIterator:
    """Iterates for ever over prompt batches; each epoch has every prompt once, in its own order.

    All processes see the same sequence of global batches, and each takes its contiguous slice of
    them. The state (`get_state`, `set_state`) is the position in that sequence, the same number in
    every process, so that a run may resume with another number of processes. A batch may span two
    epochs.

    Args:
      source: the problems.
      tokenizer: what to encode with.
      batch_size: number of prompts in a global batch; a multiple of `process_count`.
      width: `P`, the number of columns.
      seed: of the shuffle, from 0 to 2**32 - 1.
      process_index: which slice to take.
      process_count: number of slices.
      template: text around `{prompt}`, or a chat template.

    Yields:
      For `n = batch_size / process_count`: `tokens` int32 [n, P], left-padded; `mask` bool [n, P],
      True on tokens; `problems`, a list of n; `index` int64 [n], positions in the source.

    Raises:
      ValueError: the sizes do not fit each other, or (while iterating) a prompt is faulty or does
        not fit `width`.
    """
    rows = local_rows(source, batch_size, process_index, process_count)

    def encode(index: np.ndarray) -> dict:
        problems = [source[int(i)] for i in index]
        names = [f"{source!r}[{i}]" for i in index]
        tokens, mask = encode_prompts(problems, tokenizer, width, template, names)
        return {"tokens": tokens, "mask": mask, "problems": problems, "index": index}

    batches = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat().batch(rows)
    # One thread: generators of problems need not be thread-safe. Two batches ahead hide slow ones.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches[process_index::process_count].map(encode).to_iter_dataset(options))


def local_rows(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    """Returns the rows of a global batch that one process has; ValueError if sizes do not fit."""
    if len(source) == 0:
        raise ValueError(f"{source!r} is empty; give a source with problems")
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is no positive multiple of the {process_count} processes; "
            "choose one that is"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0 to {process_count - 1}")
    return batch_size // process_count


def _check_length(length: int, width: int) -> None:
    if length == 0:
        raise ValueError("the prompt has no tokens; remove the record or use a template with text")
    if length > width:
        raise ValueError(
            f"the prompt has {length} tokens, more than the prompt width of {width}; "
            "widen it or remove the record"
        )
