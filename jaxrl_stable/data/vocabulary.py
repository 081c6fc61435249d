"""Trains a SentencePiece model on the texts of a data set, for models trained from scratch."""

import io
import os
import pathlib
from collections.abc import Iterable

import sentencepiece

from jaxrl_stable.data.tokenizer import SentencePieceTokenizer
from jaxrl_stable.files import write_atomic

# Special ids of the tokenizers that `train_sentencepiece` writes.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
# A vocabulary smaller than this has no room for the 256 pieces of byte fallback.
_MIN_BYTE_FALLBACK = 1024


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    byte_fallback: bool | None = None,
) -> SentencePieceTokenizer:
    """Trains a byte-pair model on `texts`, writes it to `path` atomically, and opens it.

    The file does not depend on the order of the texts. Text is taken literally (no Unicode
    normalisation, no added or dropped spaces), so that `decode(encode(x)) == x`. This is checked on
    every training text. Each digit is a separate token, and so is the line break. Ids: pad 0,
    BOS 1, EOS 2, unknown 3.

    Args:
      texts: training texts; the vocabulary contains all their characters.
      path: `.model` file to write.
      vocab_size: exact number of pieces, including the four special ones.
      byte_fallback: whether to spell unknown characters in bytes (which takes 256 pieces) instead
        of losing them; by default only if `vocab_size` is at least 1,024.

    Raises:
      ValueError: if `texts` is empty, `vocab_size` is too small or too large for it, or a text does
        not round-trip.
    """
    texts = sorted(texts)
    if not any(texts):
        raise ValueError("train_sentencepiece: no text to train on; give at least one")
    if byte_fallback is None:
        byte_fallback = vocab_size >= _MIN_BYTE_FALLBACK
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            character_coverage=1.0,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # SentencePiece silently skips longer texts.
            max_sentence_length=4 * max(map(len, texts)) + 1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # The message ends with the advice: "... too high (N). Please set it to a value <= M."
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise ValueError(
            f"train_sentencepiece: vocab_size {vocab_size} does not suit these texts: {reason}"
        ) from None
    model = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    for text in texts:
        if model.decode(model.encode(text)) != text:
            raise ValueError(
                f"train_sentencepiece: {text[:60]!r} does not survive encoding; remove carriage "
                "returns, other control characters and U+2581 from it"
            )
    write_atomic(pathlib.Path(path), buffer.getvalue())
    return SentencePieceTokenizer(path)
