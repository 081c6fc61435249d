r"""Where the answer of a response is: `####`, boxes, headings, and the text next to a box."""

import time

import pytest

from jaxrl_stable.rewards import parse_number
from jaxrl_stable.rewards.answer import find_answer, marked_answer
from jaxrl_stable.rewards.context import changes_in_context

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("17+25=42 42-8=34 #### 34", "34"),
        ("#### 1\n#### 2 \nbye", "2"),
        ("####\n 5", "5"),
        (r"so \boxed{7} and, after that, \boxed{ 8 }.", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{3} and \boxed{4", "3"),  # the last balanced one
        (r"\boxed{1 \boxed{2}}", "2"),
        (r"\boxed{1} #### 2", "2"),
        (r"#### so \boxed{9}", "9"),
        ("####", ""),
        ("plain 5", None),
        (r"box{5} {6}", None),
        ("#### 5" + " " * 3_000, "5"),
        (r"\boxed{5}" + "x" * 3_000_000, "5"),
        # Other boxes, and boxes without braces.
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\framebox {5}", "5"),
        (r"$\boxed 5$ is it", "5"),
        ("\\boxed 5\nbye", "5"),
        (r"\boxedx{5}", None),
        # Boxes that are one answer together.
        (r"\boxed{7} or \boxed{8}", "7 or 8"),
        (r"$x=\boxed{7}$, $x = \boxed{8}$", "7, 8"),
        (r"\boxed{6}, \boxed{7} and \boxed{8}", "6, 7, 8"),
        # Empty marks.
        ("42\n####", ""),
        ("#### 72 ####", "72"),
        ("#### 72 #### 73 ####", "73"),
        ("#### C#", "C#"),
        (r"put it in \boxed{}. \boxed{4} \boxed{}", "4"),
        ("#### 4\nThe mark is `####`.", "4"),
        ("#### 72\n\nNote: #### marks the answer", "72"),
        # Headings.
        ("\\boxed{42}\n\n#### Verification\n40+2 is 42.", "42"),
        ("#### 42\n#### **Step 2: the check**\n40+2 is 42.", "42"),
        ("#### Step 2: total\nSo it is 42.", None),
        ("#### Final Answer:\n\n42\n", "42"),
        ("#### Answer: 42\nbye", "Answer: 42"),
        ("#### Summary", "Summary"),  # nothing behind it: an answer
        ("\\boxed{42}\n#### none\nof these", "none"),
        ("\\boxed{42}\n#### No solution\nas seen", "No solution"),
    ],
)
def test_marked_answer(text, answer):
    assert marked_answer(text) == answer


CHANGED = [
    r"-\boxed{5}",
    r"$x = -\boxed{5}$",
    r"$2\cdot\boxed{5}$",
    r"$2\boxed{5}$",
    r"$\frac{\boxed{5}}{2}$",
    r"$\sqrt{\boxed{5}}$",
    r"$\frac{1}{2}\boxed{5}$",
    r"$x \neq \boxed{5}$",
    r"x > \boxed{5}",
    r"$\boxed{5}\pi$",
    r"$\boxed{5}^2$",
    r"$\boxed{5} + 3$",
    r"$\boxed{5} \cdot 10^3$",
    r"\boxed{5}k",
    r"\boxed{5} k",
    r"\boxed{5} million",
    r"$\boxed{5}$ thousand",
    r"\boxed{5} and a half",
    r"\boxed{5}\text{ dozen}",
    r"**\boxed{5}** hundred",
    r"\boxed{5} is not the answer",
    r"\boxed{5} isn't right",
    r"\boxed{5} is wrong",
    r"not \boxed{5}",
    r"negative \boxed{5}",
    r"It is half of \boxed{5}",
]
UNCHANGED = [
    r"\boxed{5}",
    r"$\boxed{5}$.",
    r"$$x = \boxed{5}$$",
    r"\[ \boxed{5} \]",
    r"**\boxed{5}**",
    r"Great! \boxed{5}",
    r"(a) \boxed{5}",
    r"\text{Answer: }\boxed{5}",
    r"\textbf{Answer} \boxed{5}",
    r"$\boxed{5}^\circ$",
    r"$\boxed{5}\text{ cm}$",
    r"\boxed{5}\\",
    r"\boxed{5} dollars",
    r"$\boxed{5}$ (which is not a square)",
    r"\boxed{5}, not 6",
    r"\boxed{5} is the only answer that is not zero",
    "\\boxed{5}\n\nHalf of it is 2.",
    r"6 is wrong, so \boxed{5}",
    r"The product of the roots is \boxed{5}",
    r"This gives a sum of \boxed{5}",
    r"so it must be at least \boxed{5}",
    r"number of halves = \boxed{5}",
]


@pytest.mark.parametrize("text", CHANGED)
def test_text_next_to_a_box_changes_it(text):
    assert changes_in_context(find_answer(text))


@pytest.mark.parametrize("text", UNCHANGED)
def test_text_next_to_a_box_leaves_it(text):
    assert not changes_in_context(find_answer(text))


def test_only_the_next_word_counts_behind_the_box_of_a_worked_solution():
    assert not changes_in_context(find_answer(r"\boxed{5} is half of 10"), worked=True)
    assert changes_in_context(find_answer(r"\boxed{5} million people"), worked=True)
    assert changes_in_context(find_answer(r"$\boxed{5}\pi$ is half"), worked=True)


@pytest.mark.parametrize(
    "text",
    [
        "#" * 10_000_000,
        "# " * 3_000_000,
        "####" * 2_000_000 + "x",
        r"\boxed{" * 1_000_000,
        r"\boxed{}" * 1_000_000,
        r"\boxed{1}, " * 500_000,
        r"\boxed " * 1_000_000,
        r"\boxed" + "{" * 5_000_000 + "}" * 5_000_000,
        "#### " + "the " * 1_000_000 + "\nx",
    ],
    ids=range(9),
)
def test_millions_of_marks_cost_nothing(text):
    start = time.perf_counter()
    answer = find_answer(text)
    assert answer is None or len(answer.text) <= 2_000
    assert time.perf_counter() - start < 1.0  # 20 ms; with types checked at run time, 0.3 s


@pytest.mark.parametrize("count", [2, 30, 200])
def test_any_number_of_joined_boxes_is_one_answer_that_is_no_number(count):
    text = ", ".join([r"\boxed{1}"] * count)
    assert find_answer(text).text.startswith("1, 1")
    assert parse_number(text) is None
