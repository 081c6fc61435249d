"""Tokenizers behind one small protocol: SentencePiece and Hugging Face `tokenizer.json`."""

import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece
import tokenizers

from jaxrl_stable.files import existing, read_json, write_atomic

# Special ids of the tokenizers that `train_sentencepiece` writes.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
# A vocabulary smaller than this has no room for the 256 pieces of byte fallback.
_MIN_BYTE_FALLBACK = 1024

_USUAL_BOS = ("<s>", "<bos>", "<|begin_of_text|>")
_USUAL_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[EOS]")
_USUAL_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
_USUAL_UNK = ("<unk>", "[UNK]")  # stands for any unknown word, so that it says nothing
_CONTROL_FORM = re.compile("<[|｜].*[|｜]>")  # DeepSeek's bars are full-width


class Tokenizer(Protocol):
    """Text to ids and back.

    `encode` adds no special tokens. `decode` leaves special tokens out, and ids beyond `vocab_size`
    as well (the rows that a model may have to round its embedding up). `bos_id` is None where
    prompts do not start with one. `eos_ids` are all ids that end a response; `eos_id` is the one to
    train on. `control_token` returns the first token of `text` that only a template may write, such
    as the end of a turn, or None.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def control_token(self, text: str) -> str | None: ...


class SentencePieceTokenizer:
    """A SentencePiece model file; one without a pad piece is padded with EOS.

    Its control pieces never come from text: `</s>` is spelled out.
    """

    def __init__(self, path: str | os.PathLike[str]):
        content = existing(path).read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError(
                f"{path}: not a SentencePiece model; give a `.model` file or `tokenizer.json`, "
                "or, if it is tiktoken's, convert it with data.convert_tiktoken"
            ) from None
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{path}: the model has no EOS piece; train it with one")
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        bos_id, pad_id = self._model.bos_id(), self._model.pad_id()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.pad_id: int = pad_id if pad_id >= 0 else self.eos_id

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size])

    def control_token(self, text: str) -> str | None:
        return None


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, or the directory of a model that has one.

    Special tokens come from the files beside it: BOS, EOS and pad from `tokenizer_config.json`,
    further EOS ids from `generation_config.json`; with neither, from the usual names. BOS is never
    taken from `generation_config.json`: Qwen names one there that its prompts must not start with.
    Without a pad token, padding uses the id of EOS.

    The text of a special token (`<|im_end|>`) encodes to that token, so that templates can contain
    it. In text from outside it would forge a turn or end the sequence, and `control_token` notices
    it: special tokens, and those in the form of `<|…|>` that a file does not mark as special
    (DeepSeek's `<｜User｜>`). Tags such as `<think>` are for everybody.
    """

    def __init__(self, path: str | os.PathLike[str]):
        file = existing(path)
        if file.is_dir():
            file = existing(file / "tokenizer.json")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file}: not a tokenizer.json ({error}); export it again") from None
        # A file may carry the settings of its last use; silent truncation would lose text.
        self._model.no_truncation()
        self._model.no_padding()

        # Ids may have gaps, so that the number of tokens is no bound.
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self._added = self._model.get_added_tokens_decoder()
        self._control: dict[int, str] = {
            i: token.content
            for i, token in self._added.items()
            if (token.special and token.content not in _USUAL_UNK)
            or _CONTROL_FORM.fullmatch(token.content)
        }

        config = read_json(file.with_name("tokenizer_config.json"))
        generation = file.with_name("generation_config.json")
        more_eos = self._generation_ids(generation, "eos_token_id")
        eos_id = self._special_id(config, "eos_token", _USUAL_EOS)
        if eos_id is None:
            eos_id = more_eos[0] if more_eos else None
        if eos_id is None:
            raise ValueError(
                f"{file}: no EOS token known; name `eos_token` in tokenizer_config.json beside it"
            )
        bos_id = self._special_id(config, "bos_token", _USUAL_BOS)
        pad_id = self._special_id(config, "pad_token", _USUAL_PAD)
        if pad_id is None:
            pad_id = next(iter(self._generation_ids(generation, "pad_token_id")), eos_id)
        self.bos_id: int | None = bos_id if config.get("add_bos_token", True) else None
        self.eos_id: int = eos_id
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([eos_id, *more_eos]))
        self.pad_id: int = pad_id

    def _special_id(self, config: dict, field: str, usual: Sequence[str]) -> int | None:
        if field in config:
            named = config[field]  # a string, null, or an object with its "content"
            named = named.get("content") if isinstance(named, dict) else named
            return None if named is None else self._model.token_to_id(named)
        if config:
            return None
        # Among the added ones: Qwen has an ordinary token `</s>`, for all the HTML it has read.
        added = {token.content: i for i, token in self._added.items()}
        return next((added[name] for name in usual if name in added), None)

    def _generation_ids(self, file: pathlib.Path, field: str) -> list[int]:
        """Ids of `generation_config.json`, which may have one, a list, null, or no such field."""
        named = read_json(file).get(field)
        ids = named if isinstance(named, list) else [] if named is None else [named]
        for i in ids:
            known = type(i) is int and 0 <= i < self.vocab_size
            if not known or self._model.id_to_token(i) is None:
                raise ValueError(
                    f"{file}: {field} {i!r} is no id of the tokenizer, whose ids end at "
                    f"{self.vocab_size - 1}; correct or remove it"
                )
        return ids

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self._model.decode(known, skip_special_tokens=True)

    def control_token(self, text: str) -> str | None:
        # By id, not by searching the text: a normaliser may turn other characters into a token's.
        return next((self._control[i] for i in self.encode(text) if i in self._control), None)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Opens a `.model` or `.json` file, or a directory with a `tokenizer` of either kind.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is of another kind or damaged.
    """
    file = existing(path)
    if file.is_dir():
        names = ("tokenizer.json", "tokenizer.model")
        found = [file / name for name in names if (file / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"{path}: has neither {names[0]} nor {names[1]}; add one, or make the first of a "
                "tiktoken file with data.convert_tiktoken"
            )
        file = found[0]
    if file.suffix == ".json":
        return HFTokenizer(file)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    raise ValueError(
        f"{path}: unknown kind of tokenizer; give a `.model` or `.json` file, or convert one of "
        "tiktoken with data.convert_tiktoken"
    )


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    byte_fallback: bool | None = None,
) -> SentencePieceTokenizer:
    """Trains a byte-pair model on `texts`, writes it to `path` in one step, and opens it.

    The same texts in any order give the same file. Text is taken literally (no Unicode
    normalisation, no added or dropped spaces), so that `decode(encode(x)) == x`, which is checked
    on every training text. Each digit is a token of its own, and so is the line break. Ids: pad 0,
    BOS 1, EOS 2, unknown 3.

    Args:
      texts: all characters that occur here are in the vocabulary.
      path: where the `.model` file goes.
      vocab_size: exact number of pieces, the four special ones included.
      byte_fallback: whether characters that do not occur are spelled in bytes (which takes 256
        pieces) rather than lost; by default from a `vocab_size` of 1,024.

    Raises:
      ValueError: there is no text, the vocabulary is too small or too large for it, or a text does
        not survive.
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
            # Longer texts would be left out without a word.
            max_sentence_length=4 * max(map(len, texts)) + 1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # The message ends in what to set: "... too high (N). Please set it to a value <= M."
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
