"""Batches for supervised fine-tuning: several examples a row, by grain's first-fit packing."""

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
    """Iterates for ever over packed batches; the source is shuffled anew for every epoch.

    An example is the prompt as in `encode_prompts`, the answer, and EOS. Prompt and answer are
    tokenised apart, so that the prompt's tokens are those that a rollout sees. An answer may use
    the model's control tokens, except those that stop. An example is never cut or split over rows.

    With several processes each packs all rows, and places those that its devices hold: which
    examples share a row depends on all examples before, so only then does a run resume exactly with
    another number of processes. That costs every host the tokenising of the whole batch.

    Args:
      source: the problems.
      tokenizer: what to encode with.
      batch_size: `B`, number of rows in a batch.
      length: `T`, the number of columns.
      seed: of the shuffle, from 0 to 2**32 - 1.
      template: text around `{prompt}`, or a chat template.

    Yields:
      `tokens` int32 [B, T], `pad_id` in padding; `segment_ids` int32 [B, T], 1, 2, ... for the
      examples of a row and 0 in padding; `positions` int32 [B, T], from 0 in each segment;
      `loss_mask` bool [B, T], True exactly where `tokens[b, t]` is of an answer or its EOS.

    Raises:
      ValueError: the source is empty, or (while iterating) an example is longer than
        `length`, or has a faulty prompt or a stop token in its answer.
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
                f"{source!r}[{index}]: the answer contains the text of a stop token; take it out, "
                "EOS is added here"
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
        # One batch is one fill of the packer, with rows in the order in which they were opened.
        num_packing_bins=batch_size,
        shuffle_bins=False,
        # Packed like the tokens, but without segment ids and positions of its own.
        meta_features=("loss_mask",),
    )
    return iter(packed.map(rename).batch(batch_size))
