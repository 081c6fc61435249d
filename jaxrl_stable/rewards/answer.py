r"""Finds the final answer in a response and what is next to it. Evaluates nothing.

The marks of an answer are `####`, `\boxed{...}`, `\fbox{...}` and `\framebox{...}`. The last mark
with a content wins, wherever it is in the text. Work is bounded for any length of the text.
"""

import re
from typing import NamedTuple

# Longest answer, and the longest end of an unmarked text, that is read.
MAX_CHARACTERS = 2_000
# Most marks that are examined, from the end; more are an attack, not an answer.
_MAX_MARKS = 32
# Text on each side of a box that may change its value, such as "million".
_CONTEXT = 80

_MARKER = "####"
_BOXES = ("\\boxed", "\\fbox", "\\framebox")
# What may surround an empty mark, as in "put the answer after `####`."
_NOTHING = " \t\r\n`'\"*_.,;:#$"
_COMMAND = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_EMPTY_MARK = re.compile(r"#{4,}|\\(?:boxed|fbox|framebox)\s*\{\s*\}")

# Words that chat models write behind `####` as a Markdown heading. The list is closed: any other
# word, such as "none", may be an answer.
_NUMBERING = r"(?:\(?[0-9A-Za-z]{1,2}[.)]\s+)?"
_ANSWER_HEADING = re.compile(
    rf"{_NUMBERING}(?:(?:the|my|our|final|correct|short|numeric|numerical)\s+)*"
    r"(?:answer|result|solution|conclusion)s?",
    re.IGNORECASE,
)
_SECTION_HEADING = re.compile(
    rf"{_NUMBERING}(?:(?:the|a|final|quick|sanity|double|detailed|my)[\s-]+)*"
    r"(?:verification|verify|verifying|check|checking|summary|notes?|explanation|analysis|reasoning"
    r"|proof|calculations?|computations?|approach|method|problem|question|given|setup|remarks?"
    r"|interpretation|discussion|working|work|derivation|review|justification|validation"
    r"|confirmation|steps|step-by-step|background|details|steps?\s+[0-9]{1,3}|part\s+\(?\w{1,3}\)?"
    r"|case\s+\(?\w{1,3}\)?|overview|strategy|plan|solution\s+(?:steps?|overview|process|method))"
    r"(?:[:.,\s–—-]+[A-Za-z][^\W\d_]*){0,12}",
    re.IGNORECASE,
)
# A sentence about the mark: "#### marks the answer".
_MENTION = re.compile(
    r"(?:marks?|is|means|denotes|indicates|precedes|introduces|shows|separates|line|sign|symbol"
    r"|format|delimiter|as|before|and|in|to|for)\b[^0-9\\]*",
)
# Between two boxes that are one answer together.
_JOINT = re.compile(
    r"[\s$]*(?:\\[()\[\]]\s*)?(?:,|;|\bor\b|\band\b|,\s*(?:or|and)\b|\\text\s*\{\s*(?:or|and)\s*\}"
    r"|\\(?:lor|vee|land|quad|qquad)\b)[\s$]*(?:\\[()\[\]]\s*)?(?:[A-Za-z]\s*=\s*)?",
)


class Answer(NamedTuple):
    """A marked answer.

    Attributes:
      text: the content of the mark.
      before: end of the text in front of a box; "" for `####`, whose line is the whole answer.
      after: start of the text behind a box, likewise.
    """

    text: str
    before: str = ""
    after: str = ""


def marked_answer(text: str) -> str | None:
    r"""Returns the content of the last mark that has one: the line at `####`, or a box.

    - A `####` with nothing behind it in its line marks the next line that is not empty. So does a
      heading such as `#### Final Answer`.
    - Other headings (`#### Verification`, `#### Step 2: total`) are not marks if text follows.
    - Empty marks are skipped. If all marks are empty, the answer is "".
    - Boxes joined by a comma, "and" or "or" are one answer: `\boxed{1} or \boxed{2}` is "1 or 2".

    Returns:
      The answer, or None if the text has no mark.
    """
    answer = find_answer(text)
    return None if answer is None else answer.text


def find_answer(text: str) -> Answer | None:
    """Like `marked_answer`, with the text on each side of a box."""
    found: Answer | None = None
    for position in _marks(text):
        if text.startswith(_MARKER, position):
            answer = _behind_hashes(text, position)
        else:
            answer = _box(text, position)
        if answer is None:
            continue
        if answer.text.strip(_NOTHING):
            return answer
        found = found or Answer("")
    return found


def without_marks(text: str) -> str:
    """Returns an unmarked or emptily marked text without the marks."""
    return _EMPTY_MARK.sub(" ", text)


def _marks(text: str) -> list[int]:
    """Returns the positions of the last marks, from the end."""
    last = {mark: text.rfind(mark) for mark in (_MARKER, *_BOXES)}
    positions: list[int] = []
    while len(positions) < _MAX_MARKS:
        mark = max(last, key=last.__getitem__)
        position = last[mark]
        if position < 0:
            break
        if mark == _MARKER:
            lowest = max(0, position - MAX_CHARACTERS)
            while position > lowest and text[position - 1] == "#":
                position -= 1
        positions.append(position)
        last[mark] = text.rfind(mark, 0, position)
    return positions


def _behind_hashes(text: str, position: int) -> Answer | None:
    after = text[position : position + MAX_CHARACTERS].lstrip("#")
    line, _, body = after.partition("\n")
    line = _without_closing_hashes(line.strip())
    body = body.strip()
    if not line.strip(_NOTHING):
        return Answer(_first_line(body))
    heading = line.strip("*_:. \t")
    if body and _ANSWER_HEADING.fullmatch(heading):
        return Answer(_first_line(body))
    if body and _SECTION_HEADING.fullmatch(heading):
        return None
    line_start = text.rfind("\n", max(0, position - MAX_CHARACTERS), position) + 1
    if text[line_start:position].strip() and _MENTION.fullmatch(line):
        return None
    return Answer(line)


def _first_line(body: str) -> str:
    # Further marks come first in `find_answer`, so hashes here belong to an empty heading.
    return _without_closing_hashes(body.split("\n", 1)[0].strip())


def _without_closing_hashes(line: str) -> str:
    """Returns a line without the hashes that may close a Markdown heading."""
    opened = line.rstrip("#")
    return opened.strip() if not opened or opened[-1].isspace() else line


def _box(text: str, position: int, joined: int = 0) -> Answer | None:
    """Returns the content of the box at `position`, with boxes in front that are joined to it.

    Returns None if the braces of the box are not balanced. `joined` counts the boxes behind it.
    """
    window = text[position : position + MAX_CHARACTERS]
    command = _COMMAND.match(window)
    if command is None:
        return None
    start = command.end()
    if not window.startswith("{", start):
        # TeX would box one token. People mean the number, or all that is in front of the `$`.
        content = re.split(r"\$|\\[)\]]|\n", window[start:], maxsplit=1)[0].strip()
        return Answer(content, text[max(0, position - _CONTEXT) : position])
    end = _closing_brace(window, start)
    if end < 0:
        return None
    content = window[start + 1 : end].strip()
    before = text[max(0, position - MAX_CHARACTERS) : position]
    joint = re.search(rf"\}}{_JOINT.pattern}$", before[-_CONTEXT:])
    if joint is not None and joined < _MAX_MARKS:
        opening = _opening_box(before[: len(before) - len(joint.group()) + 1], joined + 1)
        if opening is not None:
            word = " or " if "or" in joint.group() else ", "
            return Answer(f"{opening}{word}{content}")
    return Answer(content, before[-_CONTEXT:], window[end + 1 : end + 1 + _CONTEXT])


def _closing_brace(text: str, start: int) -> int:
    depth, escaped = 0, False
    for position in range(start, len(text)):
        character = text[position]
        if escaped:  # \{ and \} are characters, not groups
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
    return -1


def _opening_box(text: str, joined: int) -> str | None:
    """Returns the content of a box that ends with `text`; see `_box`."""
    position = max(map(text.rfind, _BOXES))
    box = None if position < 0 else _box(text, position, joined)
    if box is None or not box.text.strip(_NOTHING) or box.after.strip():
        return None
    return box.text
