"""Prompt batches for rollouts: shuffled, endless, left-padded, split over processes."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int

from jaxrl_stable.checks import record_name
from jaxrl_stable.data.records import Problem, check_characters
from jaxrl_stable.data.sources import Source
from jaxrl_stable.data.templates import PLACE, ChatTemplate, Template, fill
from jaxrl_stable.data.tokenizer import Tokenizer, prefix_ids

CHECKED_TOGETHER = 1000  # records, which bounds the memory of their encodings


def prompt_ids(problem: Problem, tokenizer: Tokenizer, template: Template = PLACE) -> list[int]:
    """Returns the token ids of one prompt.

    A plain template is filled in and preceded by BOS if the tokenizer adds one. A chat template
    writes BOS itself if the model needs it.

    Raises:
      ValueError: if the template does not contain `{prompt}` exactly once or fails to render, or if
        the problem contains a control token (`Tokenizer.control_token`) or half of a surrogate
        pair. Spelling a control token out would be safe, but prompts that were already rendered,
        with any template, would then pass unnoticed and make no sense.
    """
    (found,) = all_prompt_ids([problem], tokenizer, template)
    if isinstance(found, ValueError):
        raise found
    return found


def all_prompt_ids(
    problems: Sequence[Problem], tokenizer: Tokenizer, template: Template = PLACE
) -> list[list[int] | ValueError]:
    """Returns, per problem, its token ids or the error that `prompt_ids` raises.

    All texts are encoded together, which is several times as fast with some tokenizers.
    """
    prefix = [] if isinstance(template, ChatTemplate) else prefix_ids(tokenizer)
    texts, errors = [], {}
    tokens = _control_tokens(problems, tokenizer)
    for i, (problem, token) in enumerate(zip(problems, tokens, strict=True)):
        try:
            texts.append(_text(problem, token, template))
        except ValueError as error:
            errors[i] = error
    ids = iter(encode_all(texts, tokenizer))
    return [errors[i] if i in errors else [*prefix, *next(ids)] for i in range(len(problems))]


def encode_all(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Encodes many texts, together if the tokenizer can."""
    batch = getattr(tokenizer, "encode_batch", None)
    return batch(texts) if batch else [tokenizer.encode(text) for text in texts]


def _text(problem: Problem, control_token: str | None, template: Template) -> str:
    """Returns the text of a prompt; raises ValueError if it is invalid."""
    check_characters(problem)
    if control_token is not None:
        raise ValueError(
            f"the prompt contains the control token {control_token!r}, which only a template may "
            "write; remove it (Data.chat writes the turns of a conversation)"
        )
    if isinstance(template, ChatTemplate):
        return template.render(problem)
    if problem.get("messages"):
        raise ValueError("the prompt is a list of messages; turn on Data.chat, or make it a string")
    return fill(template, problem["prompt"])


def _control_tokens(problems: Sequence[Problem], tokenizer: Tokenizer) -> list[str | None]:
    """Returns the first control token of each problem, or None."""
    texts, owners = [], []
    for owner, problem in enumerate(problems):
        turns = [turn["content"] for turn in problem.get("messages", [])]
        for text in dict.fromkeys([*turns, problem["prompt"]]):
            texts.append(text.encode("utf-8", errors="replace").decode())  # half characters: later
            owners.append(owner)
    batch = getattr(tokenizer, "control_tokens", None)
    tokens = batch(texts) if batch else [tokenizer.control_token(text) for text in texts]
    found: list[str | None] = [None] * len(problems)
    for owner, token in zip(owners, tokens, strict=True):
        found[owner] = found[owner] or token
    return found


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
      ValueError: if a prompt is invalid or does not fit. The message names the first such record
        (file and line, if the source knows them), their number, and the width that all prompts
        need.
    """

    def lengths(problems: Sequence[Problem]) -> list[int | ValueError]:
        found = all_prompt_ids(problems, tokenizer, template)
        return [ids if isinstance(ids, ValueError) else len(ids) for ids in found]

    return check_lengths(source, lengths, lambda length: _check_length(length, width))


def check_lengths(
    source: Source,
    lengths: Callable[[Sequence[Problem]], Sequence[int | ValueError]],
    check: Callable[[int], None],
) -> int:
    """Checks the length of every record of a source.

    Args:
      source: the problems.
      lengths: returns the length of each problem in tokens, or what is wrong with it.
      check: raises ValueError if a length is not allowed.

    Returns:
      The largest length.

    Raises:
      ValueError: if a record is faulty. The message names the first one, their number, and the
        largest length.
    """
    first, faulty, longest = "", 0, 0
    for start in range(0, len(source), CHECKED_TOGETHER):
        indices = range(start, min(start + CHECKED_TOGETHER, len(source)))
        for i, length in zip(indices, lengths([source[i] for i in indices]), strict=True):
            try:
                if isinstance(length, ValueError):
                    raise length
                longest = max(longest, length)
                check(length)
            except ValueError as error:
                first = first or f"{record_name(source, i)}: {error}"
                faulty += 1
    if faulty:
        raise ValueError(
            f"{first} (records affected: {faulty} of {len(source)}; longest: {longest} tokens)"
        )
    return longest


def overlap(train: Source, heldout: Source, problems: int) -> str:
    """Returns how many held-out prompts are also training prompts, in one line; "" if none is.

    Prompts are compared as text, up to white space.

    Args:
      train: training problems.
      heldout: held-out problems.
      problems: number of held-out problems that are evaluated, from the start.
    """
    asked = {_turns(heldout[i]) for i in range(problems)}
    known = asked.intersection(_turns(train[i]) for i in range(len(train)))
    shared = sum(_turns(heldout[i]) in known for i in range(problems))
    return f"{shared} of {problems} held-out prompts are in the training set" if shared else ""


def _turns(problem: Problem) -> tuple[str, ...]:
    """Returns the texts of a prompt and its earlier turns, with white space made uniform."""
    earlier = [f"{turn['role']} {turn['content']}" for turn in problem.get("messages", [])[:-1]]
    return tuple(" ".join(text.split()) for text in (*earlier, problem["prompt"]))


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
        names = [record_name(source, int(i)) for i in index[held]]
        known = [problem for problem in problems if problem is not None]
        tokens[held], mask[held] = encode_prompts(known, tokenizer, width, template, names)
        return {"tokens": tokens, "mask": mask, "problems": problems, "index": index}

    order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    # An endless data set has sys.maxsize items. grain rounds their number in batches of one, in
    # floating point, to more than that, and fails.
    batches = order.batch(batch_size) if batch_size > 1 else order.map(lambda i: np.array([i]))
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
            "increase the width (Data.prompt_width) or remove the record"
        )
