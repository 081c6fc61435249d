"""Batches of demonstrations: several examples per row, by grain's first-fit packing."""

from collections.abc import Sequence

import grain
import grain.experimental
import numpy as np

from jaxrl_stable.checks import record_name
from jaxrl_stable.data.prompts import (
    all_prompt_ids,
    check_lengths,
    check_size,
    encode_all,
    prompt_ids,
)
from jaxrl_stable.data.records import Problem
from jaxrl_stable.data.sources import Source
from jaxrl_stable.data.templates import PLACE, Template
from jaxrl_stable.data.tokenizer import Tokenizer
from jaxrl_stable.data.turns import Ending, ending


def packed_iterator(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    template: Template = PLACE,
) -> grain.DatasetIterator:
    """Iterates forever over packed batches. The source is reshuffled in every epoch.

    An example is the prompt as in `encode_prompts`, the answer, and the token that ends a response
    (`turns.ending`: EOS, or the chat template's end of a turn). Prompt and answer are tokenised
    separately, so that the prompt has the tokens that a rollout sees. An answer may contain the
    model's control tokens, except stop tokens. An example is never truncated, nor split over rows.

    With several processes, each process packs all rows and keeps those that its devices hold. Which
    examples share a row depends on all earlier examples, so this is the only way to resume exactly
    with another number of processes. The price is that every host tokenises the whole batch.

    Args:
      source: the problems.
      tokenizer: the tokenizer of the model.
      batch_size: `B`, number of rows per batch.
      length: `T`, number of columns.
      seed: seed of the shuffle, from 0 to 2**32 - 1.
      template: text around `{prompt}`, or a chat template.

    Yields:
      A dict with:
        tokens: int32 [B, T], `pad_id` in padding.
        segment_ids: int32 [B, T], 1, 2, ... for the examples of a row and 0 in padding.
        positions: int32 [B, T], counted from 0 in each segment.
        loss_mask: bool [B, T], True exactly where `tokens[b, t]` belongs to an answer or ends it.

    Raises:
      ValueError: if the source is empty or, while iterating, if an example is longer than
        `length`, its prompt is invalid, or its answer contains a stop token.
    """
    check_size(source, batch_size)
    end = ending(tokenizer, template)

    def example(index: int) -> dict[str, np.ndarray]:
        problem = source[int(index)]
        try:
            prompt = prompt_ids(problem, tokenizer, template)
            response = _response(tokenizer.encode(problem["answer"]), end)
            _check_total(len(prompt) + len(response), length)
        except ValueError as error:
            raise ValueError(f"{record_name(source, int(index))}: {error}") from None
        tokens = np.asarray(prompt + response, np.int32)
        return {"tokens": tokens, "loss_mask": np.arange(len(tokens)) >= len(prompt)}

    def rename(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "tokens": row["tokens"],
            "segment_ids": row["tokens_segment_ids"],
            "positions": row["tokens_positions"],
            "loss_mask": row["loss_mask"],
        }

    order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    # One thread, as in `prompt_iterator`.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    examples = order.map(example).to_iter_dataset(options)
    packed = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={"tokens": length, "loss_mask": length},
        padding_struct={"tokens": tokenizer.pad_id, "loss_mask": False},
        # One batch is one fill of the packer; rows stay in the order in which they were opened.
        num_packing_bins=batch_size,
        shuffle_bins=False,
        # Packed like the tokens, without its own segment ids and positions.
        meta_features=("loss_mask",),
    )
    return iter(packed.map(rename).batch(batch_size))


def check_demonstrations(
    source: Source,
    tokenizer: Tokenizer,
    length: int,
    template: Template = PLACE,
    context: int = 0,
) -> int:
    """Checks before a run that `packed_iterator` can use every record.

    Args:
      source: the problems.
      tokenizer: the tokenizer of the model.
      length: `T`, number of columns of a packed row.
      template: text around `{prompt}`, or a chat template.
      context: positions that the model was trained for; 0 if not known. A row may be longer, since
        positions are counted in each example.

    Returns:
      Length of the longest example in tokens.

    Raises:
      ValueError: if a prompt is invalid, an answer contains a stop token, or an example is longer
        than `length` or `context`. The message names the first such record (file and line, if the
        source knows them) and their number.
    """
    end = ending(tokenizer, template)

    def lengths(problems: Sequence[Problem]) -> list[int | ValueError]:
        prompts = all_prompt_ids(problems, tokenizer, template)
        good = [i for i, ids in enumerate(prompts) if not isinstance(ids, ValueError)]
        found: list = list(prompts)
        answers = encode_all([problems[i]["answer"] for i in good], tokenizer)
        for i, answer in zip(good, answers, strict=True):
            try:
                found[i] = len(prompts[i]) + len(_response(answer, end))
            except ValueError as error:
                found[i] = error
        return found

    return check_lengths(source, lengths, lambda total: _check_total(total, length, context))


def _response(answer: list[int], end: Ending) -> list[int]:
    """Returns an answer and the token that ends it."""
    if not set(end.stop_ids).isdisjoint(answer):
        raise ValueError(
            "the answer contains the text of a stop token; remove it, the end of a response is "
            "appended here"
        )
    return [*answer, end.token]


def _check_total(total: int, length: int, context: int = 0) -> None:
    if total > length:
        raise ValueError(
            f"the example has {total} tokens, more than the row length of {length}; lengthen the "
            "rows (Supervised.length) or remove the record"
        )
    if context and total > context:
        raise ValueError(
            f"the example has {total} tokens, more than the {context} positions that the model was "
            "trained for (ModelConfig.max_positions); remove the record"
        )
