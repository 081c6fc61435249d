"""A problem, and how it is read from a line of a JSONL file."""

import gzip
import json
import os
import zlib
from typing import Any, NamedTuple, NotRequired, TypedDict

ROLES = ("system", "user", "assistant")

_GZIP = b"\x1f\x8b"  # the first bytes of every gzip file
_BOM = b"\xef\xbb\xbf"


class Message(TypedDict):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


class Problem(TypedDict):
    """A prompt and its reference answer, which a reward function reads.

    A conversation has all its turns in `messages`. The last turn is the user's and is also the
    prompt. A problem may have further fields, which only the reward function reads.
    """

    prompt: str
    answer: str
    messages: NotRequired[list[Message]]


class Records(NamedTuple):
    """Content of a JSONL file.

    Attributes:
      problems: one per line that is not blank.
      lines: number of the line of each problem, from 1.
      crc32: checksum of the file, uncompressed.
    """

    problems: list[Problem]
    lines: list[int]
    crc32: int


def read_records(path: str | os.PathLike[str]) -> Records:
    """Reads and checks a JSONL file, which may be gzip-compressed and start with a UTF-8 BOM.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if a line is invalid. The message names the first such line, its field, what to
        do, and the number of invalid lines.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such data set; check the path") from None
    if content.startswith(_GZIP):  # whatever the file is called
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged gzip file ({error}); compress or download it again"
            ) from None
    records = Records([], [], zlib.crc32(content))
    faults = []
    # Not str.splitlines, which also splits at U+2028 and others that JSON strings may contain.
    for number, line in enumerate(content.removeprefix(_BOM).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.problems.append(parse_line(line))
            records.lines.append(number)
        except ValueError as error:
            faults.append(f"{path}, line {number}: {error}")
    if faults:
        raise ValueError(f"{faults[0]} (faulty lines in this file: {len(faults)})")
    if not records.problems:
        raise ValueError(
            f'{path}: empty data set; write one {{"prompt": "...", "answer": "..."}} per line'
        )
    return records


def parse_line(line: bytes) -> Problem:
    """Returns the problem on a line, with all its fields.

    A field called `messages` is left out: in a problem, that name is the conversation's, which a
    file has in `prompt`.

    Raises:
      ValueError: if the line is invalid. The message names the field and says what to do.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1} is not UTF-8; save the file in that encoding"
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); write one JSON object per line") from None
    if not isinstance(record, dict):
        raise ValueError(
            f"expected a JSON object, found {_json_type(record)}; "
            'write {"prompt": "...", "answer": "..."}'
        )
    for field in ("prompt", "answer"):
        if field not in record:
            present = ", ".join(map(repr, sorted(record))) or "none"
            raise ValueError(
                f"field {field!r} is missing (present: {present}); add it or rename one"
            )
        if field == "prompt" and isinstance(record[field], list):
            _check_messages(record[field])
            continue
        if not isinstance(record[field], str):
            found = _json_type(record[field])
            remedy = "put it in quotes" if found == "number" else "make it a string"
            raise ValueError(f"field {field!r} is a {found}, expected a string; {remedy}")
        if not record[field].strip():
            raise ValueError(f"field {field!r} is empty; fill it in or remove the line")
    prompt = record["prompt"]
    record.pop("messages", None)
    problem = Problem(**record)
    if not isinstance(prompt, str):
        problem |= Problem(prompt=prompt[-1]["content"], messages=prompt)
    check_characters(problem)
    return problem


def check_characters(problem: Problem) -> None:
    """Checks that prompt, turns and answer consist of whole characters, as UTF-8 requires.

    Raises:
      ValueError: if a text contains half of a surrogate pair, as texts do that were cut in UTF-16
        (JavaScript). No tokenizer can encode it.
    """
    turns = enumerate(problem.get("messages", []), start=1)
    texts = {f"field 'prompt', message {number},": turn["content"] for number, turn in turns}
    texts |= {f"field {field!r}": problem.get(field, "") for field in ("prompt", "answer")}
    for name, text in texts.items():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} has half of a surrogate pair, \\u{ord(text[error.start]):04x}, as "
                f"character {error.start + 1}; an emoji was cut in two there, remove it"
            ) from None


def _check_messages(messages: list) -> None:
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if set(fields) != {"role", "content"} or role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"field 'prompt', message {number}: expected a role ({', '.join(ROLES)}) and "
                'text content, nothing else; write {"role": "user", "content": "..."}'
            )
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(
            "field 'prompt' is a conversation that does not end with a user message; "
            "add one, and move what follows it to 'answer'"
        )


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
