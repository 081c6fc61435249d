r"""Looks next to a box for what changes its value: `-\boxed{5}`, `\boxed{5} million`."""

import re

from jaxrl_stable.rewards import words
from jaxrl_stable.rewards.answer import Answer
from jaxrl_stable.rewards.number import plain

_FUNCTIONS = (
    r"\\(?:times|cdot|div|pm|mp|[dtc]?frac|sqrt|pi|infty|e|ln|log|sin|cos|tan|binom|p?mod|bmod"
    r"|theta|alpha|beta|left|cup|cap)(?![A-Za-z])"
)
# Relations and operators that end in front of a box.
_OPERATOR_BEFORE = re.compile(
    r"(?:(?:[-−–+/^|<>≤≥≠×·÷±√π]|(?<!\\)[(\[]|[0-9)]\s*\*|\\(?:neq?|not|l[te]q?|leq|g[te]q?|geq|approx\s*\\not)"
    rf"|{_FUNCTIONS})\s*|[0-9A-Za-z](?<![A-Za-z]{{2}}))$"
)
# A group in front of a box is a factor, unless it is text; an open group is an argument.
_GROUP_BEFORE = re.compile(r"(\\[A-Za-z]+)?(?:\s*\{[^{}]*\})*\s*(?:\{[^{}]*\}|\{)\s*$")
_TEXT_COMMAND = re.compile(
    r"\\(?:text\w*|mbox|hbox|math(?:rm|bf|it|sf)|f?boxe?d?|framebox|begin|color)"
)
_OPERATOR_AFTER = re.compile(
    rf"[+*/!(\[|>≤≥×·÷±√π∞½0-9A-Za-z]|<(?![/A-Za-z])|\^(?!\s*\{{?\s*(?:\\circ|°))|_(?![\s_]|$)"
    rf"|[-−–]\s?[0-9A-Za-z\\]|{_FUNCTIONS}|\\(?:%|\$)\s*[0-9]"
)
_MATH_SPACE = re.compile(r"(?:\\[,;:! ]|[^\S\n])*")
_BOLD = re.compile(r"\*{2,}|\*(?=[\s.]|$)")
# What may be between a box and the words next to it.
_CLOSING = re.compile(r"(?:\s|\$|\\[)\]]|[*_`}]|\\[,;:! ])*")
_VERBS = frozenset(
    ("is", "was", "isn't", "wasn't", "cannot", "can't", "does", "doesn't", "seems", "not", "would")
)
_SCALE_LETTERS = frozenset(("k", "K", "m", "M", "b", "B", "bn", "mn", "T", "pi"))


def changes_in_context(answer: Answer, *, worked: bool = False) -> bool:
    """Returns whether text next to a box changes its value.

    Args:
      answer: a marked answer and its context.
      worked: whether the text is a worked solution of a data set, which may go on in the sentence
        of its answer, so that only the nearest words count.
    """
    before = answer.before
    group = _GROUP_BEFORE.search(before)
    if group is not None:
        if group.group(1) is None or not _TEXT_COMMAND.fullmatch(group.group(1)):
            return before.endswith("}") or before.rstrip().endswith("{")
    elif _OPERATOR_BEFORE.search(before):
        return True
    after = _BOLD.sub("", answer.after, count=1)
    gap = _MATH_SPACE.match(after).end()
    in_math = before.count("$") % 2 == 1 and "$" in after
    if (gap == 0 or in_math or after[:1] == "\\") and _OPERATOR_AFTER.match(after, gap):
        return True
    if not worked and _changed_by_words(before):
        return True
    line = after.split("\n", 1)[0]
    behind = plain(line[_CLOSING.match(line).end() :])
    found = re.findall(r"[A-Za-zÀ-ÿ'’-]+", re.split(r"[.!?;:]", behind, maxsplit=1)[0])
    if not found or behind.lstrip().startswith(","):
        return False
    first = found[0].lower().replace("’", "'")
    near = found[:3] if first in ("and", "or") else found[: 1 if worked else 2]
    if any(words.is_strong(word) and word.lower() not in words.NEGATIONS for word in near):
        return True
    if first in _VERBS and any(_denies(word) for word in found[: 2 if worked else 4]):
        return True
    return behind.lstrip()[:1].isalpha() and found[0] in _SCALE_LETTERS


def _denies(word: str) -> bool:
    word = word.lower().replace("’", "'")
    return word in words.NEGATIONS or word.endswith("n't")


def _changed_by_words(before: str) -> bool:
    clause = re.split(r"[.,;:=\n]", before)[-1]
    last = [word.lower() for word in re.findall(r"[A-Za-z']+", clause)[-2:]]
    if any(map(_denies, last)):
        return True
    return bool(last) and last[-1] not in words.LINKS and not words.MULTIPLES.isdisjoint(last)
