r"""Compares final answers as mathematics (LaTeX), with math-verify.

Numbers, words and equal texts need no symbolic work (`literal`). Everything else does. It may never
finish and can fail in many ways, so it runs only in a worker process (`load_reward("math")`), which
the parent kills by its wall clock. math-verify's own time limits, which need SIGALRM, are switched
off. Only its LaTeX parser is used: its parser for plain expressions calls sympy's `parse_expr`,
which evaluates Python.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from jaxrl_stable.rewards.literal import (
    Form,
    differs,
    equal_numbers,
    equal_texts,
    is_approximation,
    is_marked,
    reference_form,
    response_form,
    running_latex,
    sides,
    without_approximation,
)
from jaxrl_stable.rewards.verdict import Verdict

try:
    import math_verify
except ImportError:
    raise ImportError(
        "the 'math' reward needs math-verify; pip install 'jaxrl_stable[tasks]'"
    ) from None

# math-verify warns that its own time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)
_LATEX = (math_verify.LatexExtractionConfig(),)


def latex_reward(problem: Mapping[str, Any], response: str) -> Verdict:
    r"""Scores 1 if `response` and `problem["answer"]` have mathematically the same answer, else 0.

    The final answer is the marked one (`answer.marked_answer`), else the only `$...$`, else the
    last LaTeX that math-verify finds. A reference without a mark is LaTeX as a whole, unless it is
    a sentence with `$...$` in it.

    Raises:
      ValueError: if the reference cannot be parsed, or is not equal to itself; `check_references`
        detects this before a run.
    """
    reference, gold = _reference(problem["answer"])
    answer = response_form(response)
    if answer is None and is_marked(response):
        return Verdict(0.0, "invalid")
    if answer is None:
        return _verify(gold, _parse(running_latex(response)))
    if reference is None:
        return _verify(gold, _parse_whole(answer.text))
    if answer.literal == reference.literal:
        return Verdict(1.0, "ok")
    if reference.is_text or answer.is_text:
        return Verdict(float(equal_texts(reference, answer)), "ok")
    if not is_approximation(reference):
        answer = without_approximation(answer)
        if answer is None:
            return Verdict(0.0, "invalid")
        if equal_numbers(reference, answer):
            return Verdict(1.0, "ok")
    if reference.value is not None and answer.value is not None:
        return Verdict(0.0, "ok")
    if differs(reference, answer):
        return Verdict(0.0, "ok")
    verdicts = [_verify(gold, _parse_whole(side)) for side in sides(answer)]
    return min(verdicts, key=lambda verdict: verdict.score)


@functools.lru_cache(maxsize=1 << 14)
def _reference(text: str) -> tuple[Form | None, list[Any]]:
    """Returns the form of a reference and its parse, which is empty for words.

    A worked solution with several `$...$` has no form: math-verify chooses the answer in it.
    """
    reference = reference_form(text)
    if reference is None:
        gold = [] if is_marked(text) else _parse(running_latex(text))
    elif reference.is_text:
        return reference, []
    elif reference.value is not None:
        gold = _parse_number(reference)
    else:
        gold = _parse_whole(reference.text)
    if not gold or not _verify(gold, gold).score:
        raise ValueError(f"reference answer {text[:60]!r} is not LaTeX; correct the data set")
    return reference, gold


def _parse_number(reference: Form) -> list[Any]:
    value = reference.value
    return _parse_whole(rf"\frac{{{value.numerator}}}{{{value.denominator}}}")


def _verify(gold: list[Any], answer: list[Any]) -> Verdict:
    if not answer or not gold:
        return Verdict(0.0, "invalid")
    right = math_verify.verify(gold, answer, timeout_seconds=None, raise_on_error=True)
    return Verdict(float(right), "ok")


def _parse_whole(text: str) -> list[Any]:
    return _parse(rf"\boxed{{{text}}}")


def _parse(text: str) -> list[Any]:
    """Returns math-verify's parse of the answer in a text; empty if it cannot parse any."""
    return math_verify.parse(
        text, extraction_config=_LATEX, fallback_mode="no_fallback", parsing_timeout=None
    )
