"""Compares final answers as strings."""

from collections.abc import Mapping
from typing import Any

from jaxrl_stable.rewards.answer import MAX_CHARACTERS, marked_answer, without_marks
from jaxrl_stable.rewards.verdict import Verdict


def normalise(text: str, *, casefold: bool = True) -> str | None:
    """Returns the final answer with each run of white space replaced by one space.

    The answer is the result of `marked_answer`, else the whole text without its empty marks.

    Args:
      text: a response or a reference.
      casefold: whether to ignore case.

    Returns:
      The normalised answer. None if it is empty, or if the text has no marked answer and more than
      2,000 characters.
    """
    answer = marked_answer(text)
    if not answer:
        if len(text) > MAX_CHARACTERS:
            return None
        answer = text if answer is None else without_marks(text)
    answer = " ".join(answer.split())
    return (answer.casefold() if casefold else answer) or None


def exact_reward(problem: Mapping[str, Any], response: str, *, casefold: bool = True) -> Verdict:
    """Scores 1 if `response` and `problem["answer"]` have the same normalised answer, else 0.

    Raises:
      ValueError: if the reference is empty or too long; `check_references` detects this before a
        run.
    """
    reference = normalise(problem["answer"], casefold=casefold)
    if reference is None:
        raise ValueError(
            f"reference answer {problem['answer'][-60:]!r} is empty or longer than "
            f"{MAX_CHARACTERS} characters; correct the data set"
        )
    answer = normalise(response, casefold=casefold)
    if answer is None:
        return Verdict(0.0, "invalid")
    return Verdict(float(answer == reference), "ok")
