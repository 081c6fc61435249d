r"""Compares answers of mathematics without symbolic work, and refuses what a parser would misread.

math-verify drops the words in `\text{...}` and the subscript of a number, and it takes a part of a
text that it cannot parse. Here those answers are compared as text, or refused.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from jaxrl_stable.rewards import words
from jaxrl_stable.rewards.answer import MAX_CHARACTERS, Answer, find_answer, without_marks
from jaxrl_stable.rewards.context import changes_in_context
from jaxrl_stable.rewards.number import read_number
from jaxrl_stable.rewards.running_text import last_number

# Longer texts are attacks, not answers: the parser takes seconds for nested brackets.
MAX_ANSWER = 300

_SEGMENT = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])")
_JOINED = re.compile(r"(?:\s|[,;.&]|\band\b|\bor\b)*")
_TEXT = re.compile(
    r"\\(?:text|mathrm|mbox|hbox|textrm|textbf|textit|textsf|texttt|mathbf|mathit|mathsf|emph)"
    r"\s*\{([^{}]*)\}"
)
_SPACE = re.compile(
    r"\\(?:[,;:! ]|(?:quad|qquad|thinspace|left|right|displaystyle)(?![A-Za-z]))|[~\s]+"
)
_UNNEEDED_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_SHORT_SCRIPT = re.compile(r"([_^])\{(\w)\}")
_NAME = re.compile(r"\\?[A-Za-z](?:_(?:\w|\{\w{1,3}\}))?\s*=\s*(?!=)")
_BASE = re.compile(r"[0-9]\}?\s*_")
_TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?:[ap]m)?")
# Two numbers with a space only: no expression, but math-verify multiplies or drops one.
_TWO_NUMBERS = re.compile(r"(?<![0-9])[0-9.]*[0-9]\s+[0-9]")
_SCRIPT = re.compile(r"(?<=[A-Za-z])_(?:\{[^{}]*\}|[0-9A-Za-z])")  # the base of a logarithm
_COMMAND_ARGUMENTS = re.compile(r"\\[A-Za-z]+\s*[0-9]\s*[0-9]?")
_REPEATING = re.compile(r"(-?)([0-9]*)\.([0-9]{0,9})\\overline\{?([0-9]{1,9})\}?")
_RELATION = re.compile(r"[<>≤≥≠∈]|\\(?:leq?|geq?|neq?|in|lt|gt|equiv|cup|to)(?![A-Za-z])|[,;]")
_EQUALS = re.compile(r"(?<![<>!:\\])=(?!=)")
_APPROXIMATION = re.compile(r"\\(?:approx|simeq)(?![A-Za-z])|≈")
# 0.333..., 5' (feet, minutes) and 0x48, of which the parser drops or reads a part.
_DROPPED = re.compile(r"[0-9]\s*(?:\.\.|…|\\[lc]?dots|'|\*$)|\b0[xob][0-9A-Fa-f]")
# 5m may be metres, millions or 5·m; only the last is a value that a parser could read.
_GLUED_LETTER = re.compile(r"[0-9]\s*[A-Za-z](?![A-Za-z])")
_JOINING_WORDS = frozenset(("and", "or"))


class Form(NamedTuple):
    r"""What is compared of an answer.

    Attributes:
      text: the answer as it is parsed, without `$`.
      literal: its normalised text.
      value: the exact value, if it is plainly a number.
      is_text: whether it is words or a time of day, which only compare as text.
    """

    text: str
    literal: str
    value: Fraction | None
    is_text: bool


def response_form(text: str) -> Form | None:
    """Returns the marked answer of a response, else its only `$...$`.

    Returns:
      None if there is neither, or if it is no answer (`refused`).
    """
    answer = find_answer(text)
    if answer is None or not answer.text:
        answer = only_segment(text)
    if answer is None or changes_in_context(answer):
        return None
    return _form(answer.text)


def is_marked(text: str) -> bool:
    """Returns whether `response_form` decides about a response, so that nothing else is read."""
    answer = find_answer(text)
    return (answer is not None and bool(answer.text)) or only_segment(text) is not None


def running_latex(text: str) -> str:
    """Returns the part of an unmarked text with several formulas that a parser may search.

    Returns:
      "" if the text has a box that is not closed, if words change its last formula, or if it has no
      LaTeX. A fraction without `$` has to be a number on its own.
    """
    tail = without_marks(text[-MAX_CHARACTERS:])
    if _BOX.search(tail):
        return ""
    segments = list(_SEGMENT.finditer(tail))
    if segments:
        last = _segment(segments[-1])
        return "" if changes_in_context(last) or refused(last.text) else tail
    if "\\begin{" in tail:
        return tail
    value = last_number(tail, cut=len(text) > MAX_CHARACTERS) if "\\" in tail else None
    return "" if value is None else rf"$\frac{{{value.numerator}}}{{{value.denominator}}}$"


def reference_form(text: str) -> Form | None:
    """Returns the marked answer of a reference, else all of it.

    Returns:
      None if the reference is empty, too long or no answer.
    """
    answer = find_answer(text)
    if answer is not None and answer.text:
        if changes_in_context(answer, worked=True):
            return None
        return _form(answer.text)
    if len(text) > MAX_CHARACTERS:
        return None
    outside = _SEGMENT.sub(" ", text)
    if outside != text and not _JOINED.fullmatch(outside):
        answer = only_segment(text)
        return None if answer is None else _form(answer.text)
    return _form(text)


def needs_parsing(reference: str) -> bool:
    """Returns whether only a parser can tell if a reference of `math` is readable."""
    form = reference_form(reference)
    return form is None or not (form.is_text or form.value is not None)


def boxed_reference(reference: str) -> str:
    """Returns a response that must score 1; an empty one for a worked solution, which has none."""
    form = reference_form(reference)
    return "" if form is None else rf"\boxed{{{form.text}}}"


def only_segment(text: str) -> Answer | None:
    r"""Returns the content of the only `$...$`, `\(...\)` or `\[...\]` in the end of a text."""
    start = max(0, len(text) - MAX_CHARACTERS)
    found = list(_SEGMENT.finditer(text, start))
    if len(found) != 1 or _BOX.search(without_marks(text[start:])):
        return None
    if start and found[0].start() == start:
        return None
    return _segment(found[0])


def _segment(match: re.Match[str]) -> Answer:
    content = next(group for group in match.groups() if group is not None)
    after = match.string[match.end() : match.end() + 80]
    return Answer(content.strip(), "", after)


def equal_numbers(first: Form, second: Form) -> bool:
    """Returns whether two numbers are equal, to six decimals if one is a decimal and none whole.

    A percent sign may be a unit or a hundredth: 50% equals 50 and 1/2.
    """
    if first.value is None or second.value is None:
        return False
    decimal = "." in first.text or "." in second.text
    decimal = decimal and first.value.denominator > 1 and second.value.denominator > 1
    return any(
        a == b
        or (decimal and round(a, 6) == round(b, 6) and abs(a - b) <= max(abs(a), abs(b)) / 100_000)
        for a in _readings(first)
        for b in _readings(second)
    )


def _readings(form: Form) -> list[Fraction]:
    return [form.value, form.value / 100] if "%" in form.text else [form.value]


def equal_texts(first: Form, second: Form) -> bool:
    """Returns whether two texts have the same words, and lists the same items in their order."""
    return _items(first) == _items(second)


def _items(form: Form) -> list[str]:
    return re.split(r"\s*(?:[,;&]|\band\b)+\s*", form.literal.casefold())


def is_approximation(form: Form) -> bool:
    r"""Returns whether a form has two sides of `\approx`."""
    return bool(_APPROXIMATION.search(form.text)) and form.value is None


def without_approximation(answer: Form) -> Form | None:
    r"""Returns what is in front of the sign in `\frac{9}{7} \approx 1.29`, else the answer.

    Returns:
      None if a number behind the sign is not close to it, or is not a number.
    """
    exact, *others = _APPROXIMATION.split(answer.text)
    if not others or not exact.strip():
        return answer
    exact, rounded = _form(exact), _form(others[0])
    if len(others) > 1 or exact is None or rounded is None or rounded.value is None:
        return None
    if exact.value is not None and abs(exact.value - rounded.value) > abs(exact.value) / 100:
        return None
    return exact


def differs(reference: Form, answer: Form) -> bool:
    """Returns whether two answers differ in what a parser drops: words, bases, relations."""
    if _BASE.search(reference.literal) or _BASE.search(answer.literal):
        return True
    if is_approximation(reference) != is_approximation(answer):
        return True
    if set(_DROPPED.findall(answer.text)) - set(_DROPPED.findall(reference.text)):
        return True
    if reference.value is not None and _GLUED_LETTER.search(answer.literal):
        return True
    changing, others = _changing_words(answer.text), _changing_words(reference.text)
    known = others | set(re.findall(r"[a-z]{2,}", reference.text))
    if "," in reference.text or ";" in reference.text or others & _JOINING_WORDS:
        known |= _JOINING_WORDS
    return bool(changing - known or (others - changing) - _JOINING_WORDS)


def sides(answer: Form) -> list[str]:
    """Returns the sides of an equation of numbers, such as 40+2=42; else the whole answer."""
    if _RELATION.search(answer.text):
        return [answer.text]
    found = [side.strip() for side in _EQUALS.split(answer.text)]
    names = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", found[0]))
    return found if len(found) > 1 and found[0] and not names else [answer.text]


def refused(text: str) -> bool:
    """Returns whether a text is no answer: empty, too long, unbalanced, or two numbers in a row."""
    if not text.strip(" .,;:$") or len(text) > MAX_ANSWER or not _balanced(text):
        return True
    bare = _COMMAND_ARGUMENTS.sub(" ", _SCRIPT.sub(" ", _SPACE.sub(" ", text)))
    return _TWO_NUMBERS.search(bare) is not None


def _form(text: str) -> Form | None:
    text = text.replace("–", "-").replace("−", "-").replace("‑", "-").strip()
    whole = _SEGMENT.fullmatch(text)
    if whole is not None and text.count("$") in (0, 2, 4):
        content = next(group for group in whole.groups() if group is not None)
        text = text if "$" in content else content.strip()
    text = text.strip("*` \t\n").rstrip("\\")
    text = re.sub(r"(?<![.\\])[.,;:]$", "", text)
    value = _read_value(text)
    if value is None and refused(text):
        return None
    literal = _literal(text)
    return Form(text, literal, value, _is_text(text, literal))


def _read_value(text: str) -> Fraction | None:
    name = _NAME.match(text)
    bare = text[name.end() :] if name is not None else text
    repeating = _REPEATING.fullmatch(bare.replace(" ", ""))
    if repeating is None:
        return read_number(bare)
    sign, whole, fixed, period = repeating.groups()
    scale = 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed)) + Fraction(int(period), 10 ** len(period) - 1)
    return (-1 if sign else 1) * value / scale


def _literal(text: str) -> str:
    text = _TEXT.sub(r" \1 ", text)
    text = _SPACE.sub(" ", text).replace("$", "").replace("\\dfrac", "\\frac")
    text = text.replace("\\tfrac", "\\frac")
    text = _SHORT_SCRIPT.sub(r"\1\2", text)
    text = _UNNEEDED_SPACE.sub("", " ".join(text.split()))
    option = re.fullmatch(r"\(([A-Za-z])\)", text)
    return option.group(1) if option is not None else text


def _is_text(text: str, literal: str) -> bool:
    if _TIME.fullmatch(literal):
        return True
    if not re.fullmatch(r"[A-Za-zÀ-ÖØ-öø-ÿ][A-Za-zÀ-ÖØ-öø-ÿ .'’-]*", literal) or "-" in literal[:2]:
        return False
    letters = re.sub(r"[^A-Za-zÀ-ÿ]", "", literal)
    in_text = len(letters) > 1 and bool(re.search(r"\\(?:text|mbox)", text))
    mixed = len(letters) > 2 and letters[0].isupper() and letters[1:].islower()
    longest = max(map(len, re.findall(r"[A-Za-zÀ-ÿ]+", literal)))
    return in_text or mixed or longest > 3


def _changing_words(text: str) -> set[str]:
    text = re.sub(r"\\[A-Za-z]+", " ", _TEXT.sub(r" \1 ", text))
    text = re.sub(r"\b(?:times|pairs?|couples?|radians?)[\s.]*$", "", text)  # what is counted
    found = re.findall(r"[A-Za-zÀ-ÿ]{2,}(?:'t)?", text)
    return {word.lower() for word in found if words.changes_value(word)}


def _balanced(text: str) -> bool:
    depth, escaped = 0, False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth < 0:
                return False
    return depth == 0
