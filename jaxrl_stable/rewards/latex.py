r"""Compares final answers as mathematics (LaTeX), with math-verify.

Symbolic comparison may never finish and can fail in many ways, so it runs only in a worker process
(`load_reward("math")`), which the parent kills by its wall clock. math-verify's own time limits,
which need SIGALRM, are switched off. Only its LaTeX parser is used: its parser for plain
expressions calls sympy's `parse_expr`, which evaluates Python.
"""

import logging
from collections.abc import Mapping
from typing import Any

from jaxrl_stable.rewards.answer import MAX_CHARACTERS, marked_answer
from jaxrl_stable.rewards.verdict import Verdict

try:
    import math_verify
except ImportError:
    raise ImportError(
        "the 'math' reward needs math-verify; pip install 'jaxrl_stable[tasks]'"
    ) from None

# math-verify warns that its own time limits are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)
# Longer texts are attacks, not answers: the parser takes seconds for nested brackets.
_MAX_MARKED = 300
_LATEX = (math_verify.LatexExtractionConfig(),)


def latex_reward(problem: Mapping[str, Any], response: str) -> Verdict:
    r"""Scores 1 if `response` and `problem["answer"]` have mathematically the same answer, else 0.

    The final answer is the text after the last `####`, else the content of the last `\boxed{...}`,
    else the last LaTeX that math-verify finds. A reference without any of these is LaTeX as a
    whole.

    Raises:
      ValueError: if the reference cannot be parsed; `check_references` detects this before a run.
    """
    reference = problem["answer"]
    gold = _parse(reference) or _parse(f"${reference}$")
    if not gold:
        raise ValueError(f"reference answer {reference[:60]!r} is not LaTeX; correct the data set")
    answer = _parse(response)
    if not answer:
        return Verdict(0.0, "invalid")
    right = math_verify.verify(gold, answer, timeout_seconds=None, raise_on_error=True)
    return Verdict(float(right), "ok")


def _parse(text: str) -> list[Any]:
    """Returns math-verify's parse of the final answer; empty if it cannot parse any."""
    marked = marked_answer(text)
    if marked is not None and len(marked) > _MAX_MARKED:
        return []
    text = text[-MAX_CHARACTERS:] if marked is None else rf"\boxed{{{marked}}}"
    return math_verify.parse(
        text, extraction_config=_LATEX, fallback_mode="no_fallback", parsing_timeout=None
    )
