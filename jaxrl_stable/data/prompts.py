"""Prompt batches for rollouts: shuffled, endless, left-padded, sharded over processes."""

from collections.abc import Sequence

import grain
import numpy as np

from jaxrl_stable.data.sources import Problem, Source
from jaxrl_stable.data.tokenizer import Tokenizer

_PLACE = "{prompt}"


def prompt_ids(problem: Problem, tokenizer: Tokenizer, template: str = _PLACE) -> list[int]:
    """Returns the ids of one prompt: BOS where the tokenizer has one, then the filled-in template.

    Raises:
      ValueError: the template does not contain `{prompt}` exactly once.
    """
    if template.count(_PLACE) != 1:
        raise ValueError(f"template {template!r} must contain {_PLACE} exactly once; put it in")
    # Not str.format: prompts and templates may contain braces of their own.
    ids = tokenizer.encode(template.replace(_PLACE, problem["prompt"]))
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    width: int,
    template: str = _PLACE,
    names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes prompts into an array, padded on the left so that responses start at column `width`.

    Args:
      problems: `B` problems.
      tokenizer: what to encode with.
      width: `P`, the number of columns.
      template: text around `{prompt}`.
      names: what an error calls each problem.

    Returns:
      tokens: int32 [B, P], `pad_id` where there is none.
      mask: bool [B, P], True on tokens.

    Raises:
      ValueError: a prompt has more than `width` tokens (nothing is ever cut off) or none at all.
    """
    tokens = np.full((len(problems), width), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(problems), width), bool)
    for row, problem in enumerate(problems):
        ids = prompt_ids(problem, tokenizer, template)
        if not 0 < len(ids) <= width:
            name = names[row] if names else f"problem {row} of this batch"
            raise ValueError(_misfit(name, len(ids), width))
        tokens[row, width - len(ids) :] = ids
        mask[row, width - len(ids) :] = True
    return tokens, mask


def check_prompts(source: Source, tokenizer: Tokenizer, width: int, template: str = _PLACE) -> int:
    """Checks before a run that every prompt fits, and returns the longest one's number of tokens.

    Raises:
      ValueError: names the first record that does not fit, how many do not, and the width that all
        need.
    """
    lengths = [len(prompt_ids(source[i], tokenizer, template)) for i in range(len(source))]
    misfits = [i for i, length in enumerate(lengths) if not 0 < length <= width]
    if misfits:
        first = misfits[0]
        raise ValueError(
            f"{_misfit(f'{source!r}[{first}]', lengths[first], width)} "
            f"(records affected: {len(misfits)} of {len(lengths)}; longest: {max(lengths)} tokens)"
        )
    return max(lengths)


def prompt_iterator(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    width: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    template: str = _PLACE,
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
      template: text around `{prompt}`.

    Yields:
      For `n = batch_size / process_count`: `tokens` int32 [n, P], left-padded; `mask` bool [n, P],
      True on tokens; `problems`, a list of n; `index` int64 [n], positions in the source.

    Raises:
      ValueError: the sizes do not fit each other, or (while iterating) a prompt does not fit
        `width`.
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


def _misfit(name: str, length: int, width: int) -> str:
    if length == 0:
        return f"{name}: the prompt has no tokens; remove the record or use a template with text"
    return (
        f"{name}: the prompt has {length} tokens, more than the prompt width of {width}; "
        "widen it or remove the record"
    )
