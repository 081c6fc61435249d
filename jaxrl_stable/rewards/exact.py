"""Compares final answers as strings."""

from collections.abc import Mapping

from jaxrl_stable.rewards.answer import MAX_CHARACTERS, marked_answer
from jaxrl_stable.rewards.verdict import Verdict


def normalise(text: str, *, casefold: bool = True) -> str | None:
    """Returns the final answer, each run of white space made one space; None where it is empty.

    The answer is what `marked_answer` finds, else the whole text, which may then have no more than
    2,000 characters.
    """
    answer = marked_answer(text)
    if answer is None:
        if len(text) > MAX_CHARACTERS:
            return None
        answer = text
    answer = " ".join(answer.split())
    return (answer.casefold() if casefold else answer) or None


def exact_reward(problem: Mapping[str, str], response: str, *, casefold: bool = True) -> Verdict:
    """Scores 1 if `response` and `problem["answer"]` have the same normalised answer, else 0.

    Raises:
      ValueError: the reference is empty or too long; `check_references` finds this before a run.
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
