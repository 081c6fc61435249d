"""Seeded word problems on addition and subtraction, for models trained from scratch."""

import dataclasses
import zlib

import numpy as np

from jaxrl_stable.checks import field_types
from jaxrl_stable.data.records import Problem

# One key in eight is held out.
_HELDOUT_MODULUS = 8

# Errors that a slip may add to a result: one or two units, or a carry.
_SLIPS = (-10, -2, -1, 1, 2, 10)

_PEOPLE = (
    ("Ann", "She"),
    ("Tom", "He"),
    ("Mia", "She"),
    ("Ben", "He"),
    ("Eva", "She"),
    ("Max", "He"),
)
_OBJECTS = ("pens", "books", "coins", "cards", "apples", "stamps")


@dataclasses.dataclass(frozen=True)
class _Story:
    """Wording of a problem. `{n}` is a number; the other fields are drawn once per problem."""

    start: str
    subject: str  # start of the sentence with the changes; may be empty
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    question: str


_STORIES = (
    _Story(
        start="{name} has {n} {objects}.",
        subject="{pronoun} ",
        plus=("buys {n}", "finds {n}", "is given {n}"),
        minus=("gives away {n}", "loses {n}", "sells {n}"),
        question="How many {objects} does {name} have now?",
    ),
    _Story(
        start="There are {n} {objects} in a box.",
        subject="",
        plus=("{n} are put in", "{n} are added"),
        minus=("{n} are taken out", "{n} are removed"),
        question="How many {objects} are in the box?",
    ),
    _Story(
        start="A shop has {n} {objects}.",
        subject="It ",
        plus=("gets {n}", "orders {n}"),
        minus=("sells {n}", "sends back {n}"),
        question="How many {objects} are left?",
    ),
)


@dataclasses.dataclass(frozen=True)
class ArithmeticSource:
    """Word problems such as "Ann has 17 pens. She buys 25 and gives away 8. How many ...?".

    The answer has GSM8K's form: a short worked solution, four hashes, and the result, as in
    `"17+25=42 42-8=34 #### 34"`. No intermediate result is negative. Item `i` is a pure function of
    the settings, the split and `i`.

    Train and held-out problems differ in their arithmetic, not only in their wording. A problem is
    held out if and only if the CRC-32 of its numbers and operations (`"17+25-8"`) is divisible
    by 8.

    Attributes:
      size: number of problems; items may repeat if few distinct problems exist.
      seed: a non-negative integer.
      split: `"train"` or `"heldout"`.
      steps: number of additions and subtractions.
      largest: the largest number in a problem's text (results may exceed it); the smallest is 1.
      slips: probability that a step of the written solution is slightly wrong, as an imperfect
        teacher's steps are; later steps continue from the wrong result. Only for demonstrations:
        an answer with a slip cannot serve as a reference.
    """

    size: int
    seed: int = 0
    split: str = "train"
    steps: int = 2
    largest: int = 50
    slips: int | float = 0.0

    def __post_init__(self):
        field_types(self)
        if self.split not in ("train", "heldout"):
            raise ValueError(f"ArithmeticSource: split is {self.split!r}; choose train or heldout")
        for field, low in (("size", 1), ("seed", 0), ("steps", 1), ("largest", 2)):
            if getattr(self, field) < low:
                raise ValueError(
                    f"ArithmeticSource: {field} is {getattr(self, field)}; set it to {low} or more"
                )

        if not 0.0 <= self.slips <= 1.0:
            raise ValueError(f"ArithmeticSource: slips is {self.slips}; set it between 0 and 1")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"{self!r} has no item {index}; its items are 0 to {self.size - 1}")
        heldout = self.split == "heldout"
        entropy = np.random.SeedSequence([self.seed, int(heldout), index])
        rng = np.random.Generator(np.random.Philox(entropy))
        while True:  # Terminates: both splits have problems even at the smallest settings.
            start, changes = _draw(rng, self.steps, self.largest)
            if is_heldout(start, changes) == heldout:
                return _tell(rng, start, changes, self.slips)


def is_heldout(start: int, changes: tuple[int, ...]) -> bool:
    """Returns whether the problem `start + changes[0] + changes[1] + ...` is held out."""
    key = f"{start}" + "".join(f"{change:+d}" for change in changes)
    return zlib.crc32(key.encode()) % _HELDOUT_MODULUS == 0


def _draw(rng: np.random.Generator, steps: int, largest: int) -> tuple[int, tuple[int, ...]]:
    start = total = int(rng.integers(1, largest + 1))
    changes = []
    for _ in range(steps):
        add = total == 0 or bool(rng.integers(2))
        amount = int(rng.integers(1, (largest if add else min(total, largest)) + 1))
        changes.append(amount if add else -amount)
        total += changes[-1]
    return start, tuple(changes)


def _tell(
    rng: np.random.Generator, start: int, changes: tuple[int, ...], slips: int | float
) -> Problem:
    story = _STORIES[rng.integers(len(_STORIES))]
    name, pronoun = _PEOPLE[rng.integers(len(_PEOPLE))]
    objects = _OBJECTS[rng.integers(len(_OBJECTS))]

    clauses, solution, total = [], [], start
    for change in changes:
        verbs = story.plus if change > 0 else story.minus
        clauses.append(verbs[rng.integers(len(verbs))].format(n=abs(change)))
        result = total + change
        if slips and rng.random() < slips:
            result = max(0, result + int(rng.choice(_SLIPS)))
        solution.append(f"{total}{change:+d}={result}")
        total = result
    told = ", ".join(clauses[:-1]) + " and " * (len(clauses) > 1) + clauses[-1]
    text = f"{story.start} {story.subject}{told}. {story.question}"
    return Problem(
        # The clauses already have their numbers; the names and the first number are still missing.
        prompt=text.format(n=start, name=name, pronoun=pronoun, objects=objects),
        answer=f"{' '.join(solution)} #### {total}",
    )
