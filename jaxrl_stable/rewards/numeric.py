r"""Compares final answers as exact numbers.

A number consists of ASCII digits with an optional sign, thousands commas, decimals or exponent, or
is a fraction `a/b`. A currency sign, a unit, a percent sign (also a unit: 50% is 50) and closing
punctuation may surround it. Anything else is not a number; in particular, nothing is ever computed.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from jaxrl_stable.rewards.answer import MAX_CHARACTERS, marked_answer
from jaxrl_stable.rewards.verdict import Verdict

# Most digits of a number. With exponents of at most two digits, arithmetic stays cheap.
MAX_DIGITS = 50
# Most characters of a marked answer, which bounds the work of the regular expressions.
_MAX_MARKED = 200

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,2}}(?![0-9]))?"
_NUMBER = rf"(?P<sign>[+-]?)(?:[$€£¥]\s?)?(?P<value>[0-9]+\s?/\s?[0-9]+|{_DECIMAL})"
# A unit contains neither digits nor operators, so "3+4" and "3 or 4" are not numbers.
_UNIT = r"[\s$€£¥%°]*(?:[A-Za-z][A-Za-z\s/.²³]*)?"
_WHOLE = re.compile(rf"{_NUMBER}{_UNIT}[\s.,;:]*")
# In running text, a number does not begin inside a word or another number, and a minus between two
# terms ("8-3") is not a sign.
_IN_TEXT = re.compile(rf"(?<![0-9A-Za-z_.)\]}}]){_NUMBER}")

_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")


def parse_number(text: str) -> Fraction | None:
    """Reads the final answer of a response or of a reference as a number.

    If `marked_answer` finds an answer, all of it must be one number. Otherwise the answer is the
    last number in the last 2,000 characters.

    Returns:
      The exact value. None if the text has no such number, or if the number has a denominator of 0
      or more than 50 digits.
    """
    marked = marked_answer(text)
    if marked is None:
        matches = list(_IN_TEXT.finditer(_plain(text[-MAX_CHARACTERS:])))
        match = matches[-1] if matches else None
    elif len(marked) > _MAX_MARKED:
        return None
    else:
        match = _WHOLE.fullmatch(_plain(marked).strip("*_` "))
    if match is None:
        return None
    value = re.sub(r"[,\s]", "", match["value"])
    if sum(map(str.isdigit, value)) > MAX_DIGITS:
        return None
    try:
        number = Fraction(value)
    except ZeroDivisionError:
        return None
    return -number if match["sign"] == "-" else number


def numeric_reward(problem: Mapping[str, Any], response: str) -> Verdict:
    """Scores 1 if the final answer of `response` equals that of `problem["answer"]`, else 0.

    Raises:
      ValueError: if the reference has no number; `check_references` detects this before a run.
    """
    reference = parse_number(problem["answer"])
    if reference is None:
        raise ValueError(
            f"reference answer {problem['answer'][-60:]!r} has no number; correct the data set"
        )
    answer = parse_number(response)
    if answer is None:
        return Verdict(0.0, "invalid")
    return Verdict(float(answer == reference), "ok")


def _plain(text: str) -> str:
    r"""Strips LaTeX markup from a number: escapes, spaces, `\text`, `\frac`, the Unicode minus."""
    text = text.replace("−", "-").replace("{,}", ",")
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    text = _LATEX_TEXT.sub(r" \1", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    return re.sub(r"\\[,;!: ]", "", text)
