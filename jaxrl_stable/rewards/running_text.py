"""Reads the last number of a text without a marked answer.

The text is cut at its words. The last piece with a digit has to be one number as a whole, so that a
part of an expression, a list, a date or a ratio is never taken for a number. The words next to it
must not change it.
"""

import re
from fractions import Fraction

from jaxrl_stable.rewards import words
from jaxrl_stable.rewards.number import (
    MAX_ANSWER,
    is_unit,
    match_number,
    plain,
    unquote,
)

# A word, with the power of a unit ("cm^2"), or a formula ("CO2"). A letter behind a digit begins no
# word, so "5kg" and "4x" stay whole; neither does a letter behind a backslash.
_WORD = re.compile(
    r"(?<![A-Za-zÀ-ÿ0-9\\_^])(?:(?:[A-Z][a-z]?[0-9]?){2,6}(?![A-Za-z0-9])"
    r"|[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ'-]*[A-Za-zÀ-ÿ](?:\s?\^\s?(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
    r"(?:/[A-Za-z]+(?:\^[0-9])?)?(?![A-Za-z0-9(]))"
)
_NUMERIC = re.compile(r"[0-9]")
_STRIPPED = " \t\r\n$*`_,;:?"
# Left sides of an equation whose right side is the answer: a name, or a computation with digits.
_NAME = re.compile(
    r"[A-Za-z](?:_?\{?[0-9A-Za-z]\}?)?(?:\([A-Za-z0-9]\))?|m?\\[A-Za-z]+(?:\s[A-Z])?"
)
_COMPUTATION = re.compile(r"[0-9\s+*/×·÷().,%$\x01\x02-]*")
_NEXT_SENTENCE = re.compile(r"(?<=[.!])[\s$*]+[AI]\s*$")
_CROSS = re.compile(r"(?<=[0-9]\s)[xX](?=\s)")
# Maths behind the last number: the answer is symbolic. A single letter is a name, except "a", "I".
_LATER_MATHS = re.compile(
    r"[=+^√π∞≠≤≥<>\x01\x02\ufffd]|\\[A-Za-z]|(?<![A-Za-z'’.])[B-HJ-Zb-z](?![A-Za-z'’]|\.[A-Za-z])"
)


def last_number(text: str, *, cut: bool = False, only: bool = False) -> Fraction | None:
    """Returns the last number of a text; None if it is not plainly a number.

    Args:
      text: at most a few thousand characters.
      cut: whether the text continues a longer one, whose last number may have been cut in two.
      only: whether to refuse a text with several numbers.
    """
    text = plain(text)
    if any(character.isnumeric() and character not in "0123456789" for character in text):
        return None
    gaps = _gaps(text)
    numeric = [i for i, (start, end) in enumerate(gaps) if _NUMERIC.search(text, start, end)]
    if not numeric or (only and len(numeric) > 1):
        return None
    start, end = gaps[numeric[-1]]
    if cut and numeric[-1] == 0:
        return None
    piece = text[start:end]
    line_start = piece.rfind("\n", 0, max(map(piece.rfind, "0123456789")))
    if only and _NUMERIC.search(piece, 0, max(line_start, 0)):
        return None
    piece = _NEXT_SENTENCE.sub("", piece[line_start + 1 :])
    begins_line = line_start >= 0 or not text[:start].strip()
    value = _read_piece(piece, begins_line)
    if value is None:
        return None
    previous = gaps[numeric[-2]][1] if len(numeric) > 1 else 0
    between = text[previous : max(start, previous)] if line_start < 0 else ""
    between += ":" if re.match(r"[\s$*`]*[,;:]", piece) else ""
    has_previous = len(numeric) > 1
    sign = _sign_before(between, has_previous)
    if sign is None or not _tail_is_harmless(piece, text[end:]):
        return None
    return sign * value


def _gaps(text: str) -> list[tuple[int, int]]:
    """Returns the pieces between words, as (start, end)."""
    gaps, start = [], 0
    for match in _WORD.finditer(text):
        gaps.append((start, match.start()))
        start = match.end()
    return [*gaps, (start, len(text))]


def _read_piece(piece: str, begins_line: bool) -> Fraction | None:
    """Reads a piece of plain text between two words as one number, or as `x = number`."""
    core = piece.split("\n", 1)[0].strip()
    # A sentence may end behind the number and another begin, without words of two letters.
    core = core.strip(_STRIPPED).removeprefix("#").strip(_STRIPPED)
    if begins_line and re.match(r"-\s", core):  # an item of a list, or a sign
        return None
    if core.endswith("..") or len(core) > MAX_ANSWER:
        return None
    core = unquote(core.removesuffix(".").strip(_STRIPPED))
    left, equals, right = core.rpartition("=")
    if equals:
        left = left.strip(_STRIPPED)
        value = _read_bare(right.strip(_STRIPPED))
        if value is None or "≈" in left or "<" in left or ">" in left:
            return None
        for side in left.split("="):
            side = side.strip(_STRIPPED)
            other = _read_bare(side) if side else value
            named = _NAME.fullmatch(side) or _COMPUTATION.fullmatch(_CROSS.sub("×", side))
            if (other is not None and other != value) or (other is None and not named):
                return None
        return value
    if core.startswith("≈"):
        core = core[1:].strip()
    return _read_bare(core)


def _read_bare(text: str) -> Fraction | None:
    """Reads a number with its sign, currency and unit, without a lead-in."""
    number = match_number(text)
    if number is None or not is_unit(text[number[1] :]):
        return None
    return number[0]


def _sign_before(between: str, has_previous: bool) -> int | None:
    """Returns 1, or -1 behind "minus"; None if the words in front of a number change it.

    Args:
      between: text between the previous number, if any, and this one.
      has_previous: whether there is a previous number.
    """
    sentences = re.split(r"[.!?]\s|\n", between)
    has_previous = has_previous and len(sentences) == 1
    found = [word.lower() for word in re.findall(r"[A-Za-zÀ-ÿ'-]*[A-Za-zÀ-ÿ]", sentences[-1])]
    if has_previous and found and not re.search(r"[,;:=]", between):
        if len(found) <= 4 and found[-1] in words.CONNECTORS:
            return None
        if len(found) == 1 and found[0] not in words.LINKS:
            return None
    sign = 1
    if found and found[-1] in ("minus", "negative") and not has_previous:
        sign, found = -1, found[:-1]
    if found and (found[-1] in words.LABELS or words.is_strong(found[-1])):
        return None
    if any(words.is_number_word(word, least=20) for word in found):
        return None
    if any(word in words.NEGATIONS or word.endswith("n't") for word in found[-4:]):
        return None
    clause = re.split(r"[,;:]", sentences[-1])[-1]
    near = [word.lower() for word in re.findall(r"[A-Za-zÀ-ÿ'-]*[A-Za-zÀ-ÿ]", clause)]
    links = [i for i, word in enumerate(near) if word in words.LINKS and word != "were"]
    if any(word in words.BEFORE for word in near[max([-1, *links]) + 1 :][-4:]):
        return None
    return sign


# Close to a number but not next to it, these may belong to the rest: "72 clips in April and May".
_FURTHER = frozenset(
    (
        "and",
        "to",
        "over",
        "under",
        "through",
        "one",
        "with",
        "from",
        "between",
        "up",
        "point",
        "but",
        "most",
    )
)


def _tail_is_harmless(piece: str, tail: str) -> bool:
    """Returns whether the text behind a number leaves it the answer."""
    if words.NO_ANSWER.search(tail) or _LATER_MATHS.search(_UNIT_POWER.sub(" ", tail)):
        return False
    if any(map(words.is_number_word, re.findall(r"[A-Za-zÀ-ÿ'-]+", tail))):
        return False
    if "?" in piece[max(map(piece.rfind, "0123456789")) :]:
        return False
    closing = piece.rstrip(' \t$*`"')
    if closing.endswith((".", "!", "\n")):
        return True
    sentence = re.split(r"[.!?]\s|[.!?]$|\n", tail, maxsplit=1)[0]
    if re.match(r"is\b(?!\s+(?:the|our|my|an?)\s)", sentence):
        return False
    found = re.findall(r"[A-Za-zÀ-ÿ'-]*[A-Za-zÀ-ÿ]", sentence)
    if any(map(words.is_strong, found)):
        return False
    if not found or closing.endswith((",", ";", ":")):
        return True
    if found[0].lower() in ("was", "are", "were", "cannot") or any(
        words.changes_value(word) and not (i and word in _FURTHER)
        for i, word in enumerate(found[:3])
    ):
        return False
    if found[0] == "is":
        return True
    return words.is_unit_word(found[0], glued=False, first=len(found[0]) > 2)


_UNIT_POWER = re.compile(rf"\b(?:{'|'.join(sorted(words.SPACED_UNITS))})\s?\^\s?\{{?-?[0-9]\}}?")
