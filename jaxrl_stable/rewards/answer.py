"""Finds the final answer in a response. Reads a bounded tail and never evaluates it."""

# Longest tail that is read: a response may have megabytes, but its answer is at the end.
MAX_CHARACTERS = 2_000

_MARKER = "####"
_BOXED = "\\boxed"


def marked_answer(text: str) -> str | None:
    r"""Returns the line after the last `####`, else the content of the last balanced `\boxed{...}`.

    Only the last 2,000 characters count. A box after the last `####` takes precedence.

    Returns:
      The answer, or None if the text has neither mark.
    """
    tail = text[-MAX_CHARACTERS:]
    _, marker, after = tail.rpartition(_MARKER)
    boxed = _last_boxed(after)
    if boxed is not None or not marker:
        return boxed
    return after.strip().split("\n", 1)[0].strip()


def _last_boxed(text: str) -> str | None:
    """Returns the content of the last balanced box.

    One pass with a stack takes linear time, even if the text consists of braces.
    """
    answer, answer_start = None, -1
    open_braces: list[int] = []
    escaped = False
    for position, character in enumerate(text):
        if escaped:  # \{ and \} are characters, not groups
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            open_braces.append(position)
        elif character == "}" and open_braces:
            start = open_braces.pop()
            if text.endswith(_BOXED, 0, start) and start > answer_start:
                answer, answer_start = text[start + 1 : position].strip(), start
    return answer
