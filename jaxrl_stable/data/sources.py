"""Problems with reference answers, behind grain's random-access protocol.

A source has `__len__`, `__getitem__(int) -> Problem` and a `__repr__` that identifies its content.
The `__repr__` has no absolute paths or memory addresses: a run records it in its checkpoint and
compares it when it resumes, to detect other data.
"""

import difflib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

from jaxrl_stable.checks import local_path

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


class Problem(TypedDict):
    """A prompt and its reference answer, which a reward function reads.

    A conversation has all its turns in `messages`. The last turn is the user's and is also the
    prompt.
    """

    prompt: str
    answer: str
    messages: NotRequired[list[Message]]


@runtime_checkable
class Source(Protocol):
    """A `RandomAccessDataSource` (grain) of problems."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


class JsonlSource:
    """A file with one `{"prompt": str, "answer": str}` per line.

    The prompt of a chat may be a list of `{"role": "user", "content": str}` that ends with the
    user's turn. The whole file is read and checked once. Blank lines are skipped and other fields
    are ignored.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if a line is invalid. The message names the first such line (1-based), its field,
        what to do, and the number of invalid lines.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = local_path("JsonlSource.path", path)
        self._name = os.path.basename(path)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such data set; check the path") from None
        self._crc32 = zlib.crc32(content)
        self._problems: list[Problem] = []
        faults = []
        # Not str.splitlines, which also splits at U+2028 and others that JSON strings may contain.
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                self._problems.append(_parse_line(line))
            except ValueError as error:
                faults.append(f"{path}, line {number}: {error}")
        if faults:
            raise ValueError(f"{faults[0]} (faulty lines in this file: {len(faults)})")
        if not self._problems:
            raise ValueError(
                f'{path}: empty data set; write one {{"prompt": "...", "answer": "..."}} per line'
            )

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[_check_index(index, len(self), self)]

    def __repr__(self) -> str:
        return f"JsonlSource({self._name!r}, size={len(self)}, crc32={self._crc32:08x})"


def _parse_line(line: bytes) -> Problem:
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
    prompt, answer = record["prompt"], record["answer"]
    if isinstance(prompt, str):
        return Problem(prompt=prompt, answer=answer)
    return Problem(prompt=prompt[-1]["content"], answer=answer, messages=prompt)


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


class ReasoningGymSource:
    """Questions and reference answers of a reasoning-gym task.

    Its scorers are never called: several of them evaluate the model's text as Python.

    In reasoning-gym, item `i` depends on `seed + i`, so two sources whose seeds differ by less than
    `size` share items. To hold out problems, split one source with `subset` instead of using a
    second seed.

    Some tasks (`rubiks_cube`, `graph_color`, ...) do not have reference answers. The constructor
    generates the first item to detect them.

    Args:
      task: name of a reasoning-gym data set, for example `"gcd"`.
      size: number of problems.
      seed: reasoning-gym's seed.
      options: the task's own settings, as a mapping or as pairs.
      solution: metadata key of a worked solution, which replaces the bare result as the answer. For
        `"gsm_symbolic"` it is `"answer_cot"`, which ends in `#### result`.

    Raises:
      ValueError: if the task, an option or the solution is unknown, if reasoning-gym is not
        installed, or if an item has no reference answer (also later, on access).
    """

    def __init__(
        self,
        task: str,
        size: int,
        seed: int = 0,
        options: Mapping[str, Any] | Sequence[tuple[str, Any]] = (),
        solution: str = "",
    ):
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise ValueError(
                "ReasoningGymSource needs reasoning-gym; pip install 'jaxrl_stable[tasks]'"
            ) from None
        if size < 1:
            raise ValueError(f"ReasoningGymSource {task!r}: size is {size}; set it to 1 or more")
        if task not in DATASETS:
            near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see its gallery"
            raise ValueError(f"reasoning-gym has no task {task!r}; {hint}")
        self._task, self._size, self._seed, self._options = task, size, seed, dict(options)
        self._solution = solution
        try:
            self._data = reasoning_gym.create_dataset(task, size=size, seed=seed, **self._options)
        except (TypeError, AssertionError, ValueError) as error:  # it validates with asserts
            raise ValueError(f"reasoning-gym task {task!r}: {error}; correct `options`") from None
        self[0]  # Raises if the task has no reference answers.

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Problem:
        item = self._data[_check_index(index, self._size, self)]
        if item["answer"] is None:
            raise ValueError(f"{self!r}[{index}] has no reference answer; choose another task")
        answer = item["answer"]
        if self._solution:
            answer = item["metadata"].get(self._solution)
            if answer is None:
                raise ValueError(
                    f"{self!r}[{index}] has no {self._solution!r}; its metadata has "
                    f"{', '.join(sorted(item['metadata']))}"
                )
        return Problem(prompt=item["question"], answer=str(answer))

    def __repr__(self) -> str:
        options = dict(sorted(self._options.items()))
        return (
            f"ReasoningGymSource({self._task!r}, size={self._size}, seed={self._seed}, "
            f"options={options}, solution={self._solution!r})"
        )


class Subset:
    """Items `start` to `stop - 1` of a source; see `subset`."""

    def __init__(self, source: Source, start: int, stop: int):
        self._source, self._start, self._stop = source, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Problem:
        return self._source[self._start + _check_index(index, len(self), self)]

    def __repr__(self) -> str:
        return f"{self._source!r}[{self._start}:{self._stop}]"


def subset(source: Source, start: int, stop: int) -> Subset:
    """Returns items `start` to `stop - 1` of `source`, for example as a held-out split.

    Raises:
      ValueError: if the range is empty or exceeds the source.
    """
    if not 0 <= start < stop <= len(source):
        raise ValueError(
            f"subset [{start}:{stop}] of {source!r} is empty or outside it; "
            f"choose 0 <= start < stop <= {len(source)}"
        )
    return Subset(source, start, stop)


def _check_index(index: int, size: int, source: Source) -> int:
    if not 0 <= index < size:
        raise IndexError(f"{source!r} has no item {index}; its items are 0 to {size - 1}")
    return index
