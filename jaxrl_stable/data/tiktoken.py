"""Converts vocabularies in tiktoken's format, as used by Qwen and Kimi, to `tokenizer.json`.

Such a file holds only byte sequences and their ranks. The rule that splits text into words is code
that comes with the checkpoint. It is never run here, so the caller names the pattern.
"""

import base64
import binascii
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxrl_stable.files import existing, read_json, write_atomic


@dataclasses.dataclass(frozen=True)
class Words:
    """How a model family splits text into words before it looks them up.

    Attributes:
      pattern: regular expression of a word.
      nfc: whether text is first normalised to Unicode's composed form (NFC). Decoding then returns
        the composed form.
    """

    pattern: str
    nfc: bool = False


_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
# Kimi: a run of Chinese characters is a word. In other words capitals come only at the start.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"

WORDS = {
    "qwen": Words(rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", nfc=True),
    # Marks belong to words: the vowel signs of Hindi, Thai, Arabic, …
    "qwen3.5": Words(
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        nfc=True,
    ),
    "kimi": Words(
        rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}|{_REST}"
    ),
}

# Published vocabularies by their number of tokens, without special ones: Qwen to Qwen3, and Qwen3.5
# and 3.6. Their files look alike.
_QWEN = {151_643: "qwen", 248_044: "qwen3.5"}


def convert_tiktoken(
    path: str | os.PathLike[str],
    words: str | Words,
    *,
    special_tokens: Mapping[str, int] | None = None,
    destination: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Writes a `tokenizer.json` that encodes text as tiktoken does with a vocabulary.

        convert_tiktoken("Moonlight/tiktoken.model", "kimi")

    Args:
      path: vocabulary file; each line is a base64 token and its rank.
      words: "qwen", "qwen3.5", "kimi", or the `Words` of another family. "qwen" is also right for
        the vocabulary of Qwen3.5 and 3.6, which is recognised by its size.
      special_tokens: text to id, with ids after the vocabulary; by default `added_tokens_decoder`
        of the `tokenizer_config.json` next to `path`.
      destination: file to write; by default `tokenizer.json` next to `path`.

    Returns:
      The file written.

    Raises:
      FileNotFoundError: if the vocabulary does not exist.
      ValueError: if a line or an id is invalid, `words` is unknown, or "qwen3.5" is given for an
        earlier vocabulary. The message names the place.
    """
    path = existing(path, "tokenizer")
    if isinstance(words, str) and words not in WORDS:
        raise ValueError(f"words {words!r} are unknown; use {', '.join(WORDS)} or Words(...)")
    ranks = read_ranks(path)
    if isinstance(words, str):
        words = WORDS[_recognised(words, len(ranks), path)]
    letters = _letters()
    spell = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    pairs = (pair for token in sorted(ranks, key=ranks.get) for pair in merges(token, ranks))
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in pairs],
            ignore_merges=True,  # a word that is in the vocabulary is one token
        )
    )
    model.normalizer = normalizers.NFC() if words.nfc else None
    split = pre_tokenizers.Split(tokenizers.Regex(words.pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    model.decoder = decoders.ByteLevel()
    if special_tokens is None:
        added = read_json(path.with_name("tokenizer_config.json")).get("added_tokens_decoder", {})
        names = {
            int(i): (token["content"], token.get("special", True)) for i, token in added.items()
        }
    else:
        names = {i: (text, True) for text, i in special_tokens.items()}
    _add_tokens(model, names, path)
    destination = pathlib.Path(destination or path.with_name("tokenizer.json"))
    write_atomic(destination, model.to_str().encode())
    return destination


def _recognised(words: str, size: int, path: pathlib.Path) -> str:
    """Returns the family of a vocabulary, given the one that the caller names and its size."""
    published = _QWEN.get(size, words)
    if words == "qwen":
        return published
    if words == "qwen3.5" and published == "qwen":
        raise ValueError(f"{path}: has the {size} tokens of Qwen3 and earlier; use words 'qwen'")
    return words


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    """Reads a tiktoken file.

    Returns:
      Rank of each byte sequence, which is also its id.

    Raises:
      ValueError: if a line is malformed, ranks are missing, or a single byte has no rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: expected base64 and a rank; is this a tiktoken file?"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{path}: its ranks do not run from 0 to {len(ranks) - 1}, or not all 256 bytes have "
            "one; is the file complete?"
        )
    return ranks


def merges(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns the pairs that merge into a token.

    Usually that is the one pair that remains after all earlier merges. If more than two parts
    remain (the vocabulary was combined from several), tiktoken joins any two adjacent halves, so
    all such pairs are returned.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, ranks[token]) for a, b in itertools.pairwise(parts)]
        at = joined.index(min(joined))
        if joined[at] >= ranks[token]:
            halves = [(token[:i], token[i:]) for i in range(1, len(token))]
            return [(a, b) for a, b in halves if a in ranks and b in ranks]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [(parts[0], parts[1])] if len(parts) == 2 else []


def _add_tokens(
    model: tokenizers.Tokenizer, names: Mapping[int, tuple[str, bool]], path: pathlib.Path
) -> None:
    """Adds tokens (text, whether special) at their ids; gaps get reserved tokens, as in Kimi."""
    start = model.get_vocab_size()
    for i in range(start, max(names, default=-1) + 1):
        text, special = names.get(i, (f"<|reserved_token_{i}|>", True))
        add = model.add_special_tokens if special else model.add_tokens
        add([tokenizers.AddedToken(text, normalized=False, special=special)])
    for i, (text, _) in names.items():
        if model.token_to_id(text) != i:
            raise ValueError(
                f"{path}: token {text!r} cannot have the id {i}; use an id from {start} on, "
                "one per text"
            )


def _letters() -> list[str]:
    """Returns the character of each byte in a byte-level `tokenizer.json`, as in GPT-2.

    A printable byte maps to itself; the others map to characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
