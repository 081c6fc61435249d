r"""Compares final answers as exact numbers.

A number is ASCII digits with an optional sign, thousands commas, decimals or exponent, or a
fraction `a/b`. Around it may stand a currency sign, a unit, a percent sign (a unit too: 50% is 50),
and closing punctuation. Anything else is no number; in particular nothing is ever computed.
"""

import re
from collections.abc import Mapping
from fractions import Fraction

from jaxrl_stable.rewards.answer import MAX_CHARACTERS, marked_answer
from jaxrl_stable.rewards.verdict import Verdict

# Digits of a number's text; with exponents of two digits at most, arithmetic stays cheap.
MAX_DIGITS = 50
# Characters of a marked answer, which bounds the work of the expressions below.
_MAX_MARKED = 200

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,2}}(?![0-9]))?"
_NUMBER = rf"(?P<sign>[+-]?)(?:[$€£¥]\s?)?(?P<value>[0-9]+\s?/\s?[0-9]+|{_DECIMAL})"
# A unit has no digits and no operators, so that "3+4" and "3 or 4" are no numbers.
_UNIT = r"[\s$€£¥%°]*(?:[A-Za-z][A-Za-z\s/.²³]*)?"
_WHOLE = re.compile(rf"{_NUMBER}{_UNIT}[\s.,;:]*")
# In running text a number does not begin within a word or a number, and a minus between two terms
# ("8-3") is no sign.
_IN_TEXT = re.compile(rf"(?<![0-9A-Za-z_.)\]}}]){_NUMBER}")

_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")


def parse_number(text: str) -> Fraction | None:
    """Reads the final answer of a response (or of a reference) as a number.

    Where `marked_answer` finds an answer, that must be one number as a whole; else it is the last
    number in the last 2,000 characters.

    Returns:
      The exact value, or None where there is no number, or it has a denominator of 0 or more than
      50 digits.
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


def numeric_reward(problem: Mapping[str, str], response: str) -> Verdict:
    """Scores 1 if the final answer of `response` equals that of `problem["answer"]`, else 0.

    Raises:
      ValueError: the reference has no number; `check_references` finds this before a run.
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
    r"""Takes LaTeX's dress off a number: escapes, spaces, `\text`, `\frac`, the true minus sign."""
    text = text.replace("−", "-").replace("{,}", ",")
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    text = _LATEX_TEXT.sub(r" \1", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    return re.sub(r"\\[,;!: ]", "", text)
