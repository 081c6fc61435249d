"""Tokenizers behind one small protocol: SentencePiece and Hugging Face `tokenizer.json`."""

import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import sentencepiece
import tokenizers
from absl import logging
from jaxtyping import Bool, Int

from jaxrl_stable import _moved
from jaxrl_stable.files import existing, read_json

REPLACEMENT = "\ufffd"  # an id without a token

_USUAL_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[EOS]")
_USUAL_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
_USUAL_UNK = ("<unk>", "[UNK]")  # replaces any unknown word, so it carries no control information
_CONTROL_FORM = re.compile("<[|｜].*[|｜]>")  # DeepSeek's bars are full-width


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back.

    `encode` does not add special tokens. `decode` drops special tokens. `control_token` returns the
    first token of `text` that only a template may write, such as the end of a turn, or None.

    A model often has more rows in its embedding than the tokenizer has tokens, and can sample their
    ids. `decode` writes each as U+FFFD, so that a reward never sees a clean text around them, and
    `unknown_tokens` counts them. They are not masked in the sampler: their mass is part of the
    policy that the trainer, other engines and transformers compute, so a mask would have to be part
    of the model.

    Two optional methods process many texts faster: `encode_batch(texts)` and
    `control_tokens(texts)`, which return one result per text. An optional attribute `gaps` has the
    ids below `vocab_size` that have no token.

    Attributes:
      vocab_size: number of ids, gaps included.
      pad_id: id of padding.
      bos_id: id at the start of prompts; None if prompts do not start with exactly one.
      eos_id: id that ends a response in training.
      eos_ids: all ids that end a response.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(
        self, ids: Sequence[int] | Int[np.ndarray, "T"], special_tokens: bool = False
    ) -> str:
        """Returns the text of ids; without special tokens, unless they are asked for."""
        ...

    def control_token(self, text: str) -> str | None: ...


class SentencePieceTokenizer:
    """A SentencePiece model file. Without a pad piece, padding uses EOS.

    Text never encodes to control pieces: `</s>` is spelled out.
    """

    def __init__(self, path: str | os.PathLike[str]):
        content = existing(path, "tokenizer").read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError(
                f"{path}: not a SentencePiece model; give a `.model` file or `tokenizer.json`, "
                "or convert a tiktoken file with data.convert_tiktoken"
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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def decode(
        self, ids: Sequence[int] | Int[np.ndarray, "T"], special_tokens: bool = False
    ) -> str:
        # BOS, EOS and pad are never shown; pieces that a user defined are ordinary text here.
        return _decode_known(self, ids, self._model.decode)

    def control_token(self, text: str) -> str | None:
        return None


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, or a model directory that contains one.

    EOS and pad come from the files next to it (`special_tokens`), further EOS ids from
    `generation_config.json`. Without these files, the usual names are tried. Without a pad token,
    padding uses EOS.

    As in transformers 5, the post-processor of `tokenizer.json` alone decides what prompts start
    with. A token that is named `bos_token` need not start a prompt: Qwen, SmolLM2 and GPT-2 name
    one. `add_bos_token` in `tokenizer_config.json` has no effect; a warning says if it contradicts.
    What the post-processor adds at the end is ignored, since a prompt is to be continued.

    The text of a special token (`<|im_end|>`) encodes to that token, so that templates can contain
    it. In untrusted text it would forge a turn or end the sequence; `control_token` detects it. It
    also detects tokens of the form `<|…|>` that the file does not mark as special (DeepSeek's
    `<｜User｜>`). Any text may contain tags such as `<think>`.

    Attributes:
      prefix_ids: ids at the start of prompts. Usually none or BOS; GLM has two.
    """

    def __init__(self, path: str | os.PathLike[str]):
        file = existing(path, "tokenizer")
        if file.is_dir():
            file = existing(file / "tokenizer.json", "tokenizer")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file}: not a tokenizer.json ({error}); export it again") from None
        # A file may store truncation and padding settings; truncation would silently lose text.
        self._model.no_truncation()
        self._model.no_padding()

        # Ids may have gaps, so the number of tokens is not an upper bound.
        known = set(self._model.get_vocab(with_added_tokens=True).values())
        self.vocab_size: int = max(known) + 1
        self.gaps: frozenset[int] = frozenset(set(range(self.vocab_size)) - known)
        self._added = self._model.get_added_tokens_decoder()
        self._control: dict[int, str] = {
            i: token.content
            for i, token in self._added.items()
            if (token.special and token.content not in _USUAL_UNK)
            or _CONTROL_FORM.fullmatch(token.content)
        }

        config = read_json(file.with_name("tokenizer_config.json"))
        named = special_tokens(file)
        usual = not config  # a configuration that names no token has none
        generation = file.with_name("generation_config.json")
        more_eos = self._generation_ids(generation, "eos_token_id")
        eos_id = self._special_id(named, "eos_token", _USUAL_EOS if usual else ())
        if eos_id is None:
            eos_id = more_eos[0] if more_eos else None
        if eos_id is None:
            raise ValueError(
                f"{file}: the EOS token is unknown; set `eos_token` in tokenizer_config.json"
            )
        pad_id = self._special_id(named, "pad_token", _USUAL_PAD if usual else ())
        if pad_id is None:
            pad_id = next(iter(self._generation_ids(generation, "pad_token_id")), eos_id)
        self.eos_id: int = eos_id
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([eos_id, *more_eos]))
        self.pad_id: int = pad_id
        self.prefix_ids = self._prefix(config)
        self.bos_id: int | None = self.prefix_ids[0] if len(self.prefix_ids) == 1 else None
        flag = config.get("add_bos_token")
        if isinstance(flag, bool) and flag != bool(self.prefix_ids):
            logging.warning(
                "%s: add_bos_token = %s in tokenizer_config.json has no effect; plain prompts "
                "start with %s, as in transformers 5",
                *(file, flag, [self._model.id_to_token(i) for i in self.prefix_ids] or "no token"),
            )

    def _prefix(self, config: dict) -> tuple[int, ...]:
        """Returns the ids that the post-processor puts in front of a text."""
        # This class of transformers replaces the post-processor by one that adds nothing.
        if str(config.get("tokenizer_class")).removesuffix("Fast") == "GPTNeoXTokenizer":
            return ()
        encoding = self._model.encode(self._model.id_to_token(self.eos_id))  # one text token
        added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(i for i, _ in itertools.takewhile(lambda pair: pair[1], added))

    def _special_id(
        self, named: Mapping[str, str | None], field: str, usual: Sequence[str]
    ) -> int | None:
        if field in named:
            text = named[field]
            return None if text is None else self._model.token_to_id(text)
        # Only among added tokens: Qwen has an ordinary token `</s>`, learned from HTML.
        added = {token.content: i for i, token in self._added.items()}
        return next((added[name] for name in usual if name in added), None)

    def _generation_ids(self, file: pathlib.Path, field: str) -> list[int]:
        """Returns the ids in a field that may be missing, null, one id or a list."""
        named = read_json(file).get(field)
        ids = named if isinstance(named, list) else [] if named is None else [named]
        for i in ids:
            known = type(i) is int and 0 <= i < self.vocab_size
            if not known or self._model.id_to_token(i) is None:
                raise ValueError(
                    f"{file}: {field} {i!r} is not an id of the tokenizer, whose ids end at "
                    f"{self.vocab_size - 1}; correct or remove it"
                )
        return ids

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Without the offsets of tokens, which nothing here reads.
        found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(
        self, ids: Sequence[int] | Int[np.ndarray, "T"], special_tokens: bool = False
    ) -> str:
        decode = partial(self._model.decode, skip_special_tokens=not special_tokens)
        return _decode_known(self, ids, decode)

    def control_token(self, text: str) -> str | None:
        return self.control_tokens([text])[0]

    def control_tokens(self, texts: Sequence[str]) -> list[str | None]:
        # Compares ids, not text: a normaliser may map other characters to a token's.
        control = self._control
        return [
            next((control[i] for i in ids if i in control), None)
            for ids in self.encode_batch(texts)
        ]


def unknown_tokens(tokenizer: Tokenizer, tokens: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    """Returns a mask of the ids that a tokenizer has no token for."""
    gaps = sorted(getattr(tokenizer, "gaps", ()))
    return (tokens < 0) | (tokens >= tokenizer.vocab_size) | np.isin(tokens, gaps)


def _decode_known(
    tokenizer: Tokenizer,
    ids: Sequence[int] | Int[np.ndarray, "T"],
    decode: Callable[[list[int]], str],
) -> str:
    """Decodes the ids between unknown ones, and writes U+FFFD for those."""
    ids = np.asarray(ids, np.int64)
    unknown = np.flatnonzero(unknown_tokens(tokenizer, ids))
    first, *others = np.split(ids, unknown)  # each of the others begins with an unknown id
    return REPLACEMENT.join([decode(first.tolist()), *(decode(x[1:].tolist()) for x in others)])


def special_tokens(file: pathlib.Path, *, overridden: bool = True) -> dict[str, str | None]:
    """Returns the special tokens that the files next to a `tokenizer.json` name.

    `special_tokens_map.json` takes precedence over `tokenizer_config.json`. As in transformers 5,
    it does not count if the latter has `added_tokens_decoder`, which made it redundant.

    Args:
      file: path of the `tokenizer.json`.
      overridden: whether to read `special_tokens_map.json`.

    Returns:
      Texts of tokens by field, such as `eos_token`; None for a null.

    Raises:
      ValueError: if a file is not a JSON object.
    """
    named = read_json(file.with_name("tokenizer_config.json"))
    if overridden and "added_tokens_decoder" not in named:
        named |= read_json(file.with_name("special_tokens_map.json"))
    texts = {}
    for field, value in named.items():  # a string, null, or an object with its "content"
        value = value.get("content") if isinstance(value, dict) else value
        if field.endswith("_token") and isinstance(value, str | None):
            texts[field] = value
    return texts


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that plain prompts start with: BOS, or what an `HFTokenizer` says."""
    if isinstance(tokenizer, HFTokenizer):
        return list(tokenizer.prefix_ids)
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Opens a `.model` or `.json` file, or a directory with a `tokenizer` of either kind.

    Raises:
      FileNotFoundError: if the path does not exist or the directory contains no tokenizer.
      ValueError: if the file has another format or is damaged.
    """
    file = existing(path, "tokenizer")
    if file.is_dir():
        names = ("tokenizer.json", "tokenizer.model")
        found = [file / name for name in names if (file / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"{path}: has neither {names[0]} nor {names[1]}; add one, or convert a tiktoken "
                "file with data.convert_tiktoken"
            )
        file = found[0]
    if file.suffix == ".json":
        return HFTokenizer(file)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    raise ValueError(
        f"{path}: unknown kind of tokenizer; give a `.model` or `.json` file, or convert a "
        "tiktoken file with data.convert_tiktoken"
    )


__getattr__ = _moved.moved_names("jaxrl_stable.data.tokenizer")  # names that have moved
