import re

import pytest

from jaxrl_stable import data
from jaxrl_stable.data.arithmetic import is_heldout


def arithmetic(problem):
    """The key of a problem, recovered from its worked solution: "17+25-8"."""
    steps = re.findall(r"(\d+)([+-]\d+)=(\d+)", problem["answer"])
    return steps[0][0] + "".join(change for _, change, _ in steps)


@pytest.mark.fast
def test_solutions_are_right():
    source = data.ArithmeticSource(2_000, seed=5, steps=3)
    for problem in source:
        steps = re.findall(r"(\d+)([+-]\d+)=(-?\d+)", problem["answer"])
        assert len(steps) == 3
        total = int(steps[0][0])
        for before, change, after in steps:
            assert int(before) == total
            total += int(change)
            assert int(after) == total >= 0
        assert problem["answer"].endswith(f" #### {total}")
        # The text has the same numbers in the same order.
        told = [int(n) for n in re.findall(r"\d+", problem["prompt"])]
        assert told == [int(steps[0][0])] + [abs(int(change)) for _, change, _ in steps]
        assert max(told) <= 50 and min(told) >= 1


def test_words_agree_with_the_operations():
    adding = "buys|finds|is given|put in|added|gets|orders"
    taking = "gives away|loses|sells|taken out|removed|sends back"
    for problem in data.ArithmeticSource(500, steps=3):
        story = problem["prompt"].split(". ")[1]
        told = [
            "+" if re.fullmatch(adding, w) else "-" for w in re.findall(f"{adding}|{taking}", story)
        ]
        assert told == re.findall(r"\d([+-])\d", problem["answer"])


@pytest.mark.fast
def test_splits_are_disjoint_in_their_arithmetic():
    train = {arithmetic(p) for p in data.ArithmeticSource(5_000, seed=1)}
    heldout = {arithmetic(p) for p in data.ArithmeticSource(5_000, seed=1, split="heldout")}
    assert len(train) > 3_000 and len(heldout) > 2_000
    assert not train & heldout
    assert is_heldout(17, (25, -8)) == (__import__("zlib").crc32(b"17+25-8") % 8 == 0)


def test_items_are_a_pure_function_of_seed_split_and_index():
    # Golden values: a change here changes every user's data.
    assert data.ArithmeticSource(2)[1] == {
        "prompt": "A shop has 37 cards. It gets 50 and sends back 1. How many cards are left?",
        "answer": "37+50=87 87-1=86 #### 86",
    }
    first, longer = data.ArithmeticSource(50), data.ArithmeticSource(60)
    assert [first[i] for i in reversed(range(50))] == [longer[i] for i in reversed(range(50))]
    other = data.ArithmeticSource(50, seed=1)
    assert sum(first[i] == other[i] for i in range(50)) < 3
    assert repr(first) != repr(other)


def test_both_splits_have_problems_at_the_smallest_settings():
    # With one step and numbers up to 2, the only held-out problem is 1-1 (CRC-32 0 mod 8).
    assert arithmetic(data.ArithmeticSource(1, split="heldout", steps=1, largest=2)[0]) == "1-1"
    for steps in (1, 2, 3):
        for split in ("train", "heldout"):
            assert data.ArithmeticSource(1, split=split, steps=steps, largest=2)[0]["prompt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0; set it to 1"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"largest": 1}, "largest is 1; set it to 2"),
        ({"split": "test"}, "split is 'test'; choose train or heldout"),
    ],
)
def test_faulty_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        data.ArithmeticSource(**{"size": 3, **settings})
