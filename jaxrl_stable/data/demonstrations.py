"""Batches of demonstrations: several examples per row, by grain's first-fit packing."""

import grain
import grain.experimental
import numpy as np

from jaxrl_stable.data.prompts import check_size, prompt_ids
from jaxrl_stable.data.sources import Source
from jaxrl_stable.data.templates import PLACE, Template
from jaxrl_stable.data.tokenizer import Tokenizer


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

    An example is the prompt as in `encode_prompts`, the answer, and EOS. Prompt and answer are
    tokenised separately, so that the prompt has the tokens that a rollout sees. An answer may
    contain the model's control tokens, except stop tokens. An example is never truncated, nor split
    over rows.

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
        loss_mask: bool [B, T], True exactly where `tokens[b, t]` belongs to an answer or its EOS.

    Raises:
      ValueError: if the source is empty or, while iterating, if an example is longer than
        `length`, its prompt is invalid, or its answer contains a stop token.
    """
    check_size(source, batch_size)
    stop = set(tokenizer.eos_ids)

    def example(index: int) -> dict[str, np.ndarray]:
        problem = source[int(index)]
        try:
            prompt = prompt_ids(problem, tokenizer, template)
        except ValueError as error:
            raise ValueError(f"{source!r}[{index}]: {error}") from None
        answer = tokenizer.encode(problem["answer"])
        if not stop.isdisjoint(answer):
            raise ValueError(
                f"{source!r}[{index}]: the answer contains the text of a stop token; remove it, "
                "EOS is appended here"
            )
        response = [*answer, tokenizer.eos_id]
        total = len(prompt) + len(response)
        if total > length:
            raise ValueError(
                f"{source!r}[{index}]: the example has {total} tokens, more than the row length of "
                f"{length}; lengthen the rows or remove the record"
            )
        return {
            "tokens": np.asarray(prompt + response, np.int32),
            "loss_mask": np.arange(total) >= len(prompt),
        }

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
