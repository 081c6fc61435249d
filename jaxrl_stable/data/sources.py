"""Problems with reference answers, behind grain's random-access protocol.

A source has `__len__`, `__getitem__(int) -> Problem` and a `__repr__` that identifies its content.
The `__repr__` has no absolute paths or memory addresses: a run records it in its checkpoint and
compares it when it resumes, to detect other data.
"""

import bisect
import difflib
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxrl_stable.checks import local_path, record_name
from jaxrl_stable.data.records import ROLES, Message, Problem, read_records

__all__ = [
    "ROLES",
    "Concatenated",
    "JsonlSource",
    "Message",
    "Problem",
    "ReasoningGymSource",
    "Remembered",
    "Source",
    "Subset",
    "concatenate",
    "open_source",
    "subset",
]


@runtime_checkable
class Source(Protocol):
    """A `RandomAccessDataSource` (grain) of problems."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


class JsonlSource:
    """A file with one `{"prompt": str, "answer": str}` per line.

    The prompt of a chat may be a list of `{"role": "user", "content": str}` that ends with the
    user's turn. The whole file is read and checked once. Blank lines are skipped. Other fields
    reach the reward function, except `messages` (see `records.parse_line`). The file may be
    compressed with gzip.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if a line is invalid. The message names the first such line (1-based), its field,
        what to do, and the number of invalid lines.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = local_path("JsonlSource.path", path)
        self._path, self._name = path, os.path.basename(path)
        self._problems, self._lines, self._crc32 = read_records(path)

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> Problem:
        return self._problems[_check_index(index, len(self), self)]

    def where(self, index: int) -> str:
        """Returns the file and line of a problem, for error messages."""
        return f"{self._path}, line {self._lines[index]}"

    def __repr__(self) -> str:
        return f"JsonlSource({self._name!r}, size={len(self)}, crc32={self._crc32:08x})"


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

    def where(self, index: int) -> str:
        """Returns the name of a problem in the whole source."""
        return record_name(self._source, self._start + index)

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


class Concatenated:
    """The problems of several sources, one source after the other; see `concatenate`."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = tuple(sources)
        self._starts = [0, *itertools.accumulate(map(len, self._sources))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Problem:
        source, within = self._locate(_check_index(index, len(self), self))
        return source[within]

    def where(self, index: int) -> str:
        """Returns the name of a problem in its own source."""
        return record_name(*self._locate(index))

    def _locate(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._sources[number], index - self._starts[number]

    def __repr__(self) -> str:
        return f"({' + '.join(map(repr, self._sources))})"


def concatenate(sources: Sequence[Source]) -> Source:
    """Returns the problems of several sources as one source, in order.

    A single source is returned as it is.

    Raises:
      ValueError: if `sources` is empty.
    """
    if not sources:
        raise ValueError("the list of data files is empty; name at least one")
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def open_source(source: Source | str | os.PathLike[str] | Sequence[Source | str]) -> Source:
    """Returns a source as it is, or opens the JSONL file at a path, or several in a list or tuple.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if a line is invalid (`JsonlSource`), or the list is empty.
    """
    if isinstance(source, str | os.PathLike):
        return JsonlSource(source)
    # A list of problems is a source itself.
    files = isinstance(source, list | tuple) and not any(isinstance(x, Mapping) for x in source)
    if files:
        return concatenate([open_source(each) for each in source])
    return source


class Remembered:
    """A source whose problems are generated once, however often they are read."""

    def __init__(self, source: Source):
        self._source = source
        self._problems: dict[int, Problem] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Problem:
        if index not in self._problems:
            self._problems[index] = self._source[index]
        return self._problems[index]

    def where(self, index: int) -> str:
        return record_name(self._source, index)

    def __repr__(self) -> str:
        return repr(self._source)


def _check_index(index: int, size: int, source: Source) -> int:
    if not 0 <= index < size:
        raise IndexError(f"{source!r} has no item {index}; its items are 0 to {size - 1}")
    return index
