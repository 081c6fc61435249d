r"""Compares final answers as exact numbers.

`number` says what a number is. A marked answer (`answer`) must be one number as a whole. Without a
mark, the last number of the text counts (`running_text`), unless it is part of something longer. A
reference must be one number, or a text with only one.
"""

import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from jaxrl_stable.rewards.answer import MAX_CHARACTERS, Answer, find_answer, without_marks
from jaxrl_stable.rewards.context import changes_in_context
from jaxrl_stable.rewards.number import read_number
from jaxrl_stable.rewards.running_text import last_number
from jaxrl_stable.rewards.verdict import Verdict


def parse_number(text: str) -> Fraction | None:
    """Reads the final answer of a response as a number.

    If `marked_answer` finds an answer, all of it must be one number. Otherwise the answer is the
    last number in the last 2,000 characters, which must not be part of a longer expression.

    Returns:
      The exact value. None if the answer is not plainly a number, or if it has a denominator of 0
      or more than 50 digits.
    """
    marked = find_answer(text)
    if marked is not None and marked.text:
        return _read_marked(marked)
    return last_number(without_marks(_tail(text)), cut=len(text) > MAX_CHARACTERS)


@functools.lru_cache(maxsize=1 << 16)
def parse_reference(text: str) -> Fraction | None:
    """Reads a reference as a number. Like `parse_number`, but never takes one number of several.

    Returns:
      The exact value. None if the reference is not plainly a number.
    """
    marked = find_answer(text)
    if marked is not None and marked.text:
        return _read_marked(marked, worked=True)
    if len(text) > MAX_CHARACTERS:
        return None
    text = without_marks(text)
    value = read_number(text)
    return last_number(text, only=True) if value is None else value


def numeric_reward(problem: Mapping[str, Any], response: str) -> Verdict:
    """Scores 1 if the final answer of `response` equals that of `problem["answer"]`, else 0.

    Raises:
      ValueError: if the reference is not plainly a number; `check_references` detects this before a
        run.
    """
    reference = parse_reference(problem["answer"])
    if reference is None:
        raise ValueError(
            f"reference answer {problem['answer'][-60:]!r} has no number; correct the data set, or "
            "choose the reward 'math' or 'exact'"
        )
    answer = parse_number(response)
    if answer is None:
        return Verdict(0.0, "invalid")
    return Verdict(float(answer == reference), "ok")


def _read_marked(answer: Answer, *, worked: bool = False) -> Fraction | None:
    changed = changes_in_context(answer, worked=worked)
    return None if changed else read_number(answer.text)


def _tail(text: str) -> str:
    return text[-MAX_CHARACTERS:]
