"""Vocabularies in tiktoken's format, as Qwen and Kimi have them, become a `tokenizer.json`.

Such a file has byte sequences and their ranks, no more. How text is cut into words is code beside
it, which is never run here: the pattern has to be named.
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
    """How a model family cuts text into words before it looks them up.

    Attributes:
      pattern: regular expression of a word.
      nfc: whether text is brought to Unicode's composed form before. What was not in it comes back
        composed when it is decoded.
    """

    pattern: str
    nfc: bool = False


_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Kimi: a run of Chinese characters is a word; other letters are, with capitals at the head alone.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"

WORDS = {
    "qwen": Words(rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", nfc=True),
    "kimi": Words(
        rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}|{_REST}"
    ),
}


def convert_tiktoken(
    path: str | os.PathLike[str],
    words: str | Words,
    *,
    special_tokens: Mapping[str, int] | None = None,
    destination: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Writes the `tokenizer.json` of a tiktoken vocabulary, which encodes as tiktoken does.

        convert_tiktoken("Moonlight/tiktoken.model", "kimi")

    Args:
      path: lines of base64 and rank.
      words: "qwen", "kimi", or `Words` of another family.
      special_tokens: texts and ids behind the vocabulary; None takes them from
        `added_tokens_decoder` of the `tokenizer_config.json` beside `path`.
      destination: where to write, by default beside `path`.

    Returns:
      The file written.

    Raises:
      FileNotFoundError: there is no such vocabulary.
      ValueError: a line or an id is wrong, or `words` unknown; says where.
    """
    path = existing(path)
    if isinstance(words, str):
        if words not in WORDS:
            raise ValueError(
                f"words {words!r} are unknown; use {' or '.join(WORDS)}, or Words(...)"
            )
        words = WORDS[words]
    ranks = read_ranks(path)
    letters = _letters()
    spell = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    pairs = (pair for token in sorted(ranks, key=ranks.get) for pair in merges(token, ranks))
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in pairs],
            ignore_merges=True,  # a word that is in the vocabulary is taken whole
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


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    """Reads a tiktoken file: byte sequences and their ranks, which are their ids."""
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
            "one; is this file whole?"
        )
    return ranks


def merges(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that make a token: the one that is left when all earlier merges have been made.

    Where these leave more than a pair (the vocabulary was put together from several), tiktoken
    joins any two that happen to meet, so all are returned.
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
    """Adds tokens (text, whether special) at their ids; ids between are reserved, as by Kimi."""
    start = model.get_vocab_size()
    for i in range(start, max(names, default=-1) + 1):
        text, special = names.get(i, (f"<|reserved_token_{i}|>", True))
        add = model.add_special_tokens if special else model.add_tokens
        add([tokenizers.AddedToken(text, normalized=False, special=special)])
    for i, (text, _) in names.items():
        if model.token_to_id(text) != i:
            raise ValueError(
                f"{path}: token {text!r} cannot have the id {i}; those from {start} on are free, "
                "each for one text"
            )


def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level `tokenizer.json`, as in GPT-2.

    A printable one stands for itself; the others follow from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
