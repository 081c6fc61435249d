import os
import time
from fractions import Fraction

import pytest

from jaxrl_stable.rewards import Verdict, numeric_reward, parse_number
from jaxrl_stable.rewards.answer import marked_answer


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("17+25=42 42-8=34 #### 34", "34"),
        ("#### 1\n#### 2 \nbye", "2"),
        ("####\n 5", "5"),
        (r"so \boxed{7} or \boxed{ 8 }.", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{3} and \boxed{4", "3"),  # the last balanced one
        (r"\boxed{1 \boxed{2}}", "2"),
        (r"\boxed{1} #### 2", "2"),
        (r"#### so \boxed{9}", "9"),
        ("####", ""),
        ("plain 5", None),
        (r"box{5} {6}", None),
        ("#### 5" + " " * 3_000, None),  # beyond the tail that is read
    ],
)
def test_marked_answer(text, answer):
    assert marked_answer(text) == answer


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 72", "72"),
        ("#### -72.", "-72"),
        ("#### +5", "5"),
        ("#### −5", "-5"),
        ("#### 1,234,567", "1234567"),
        ("#### 0012", "12"),
        ("#### 3.50", "7/2"),
        ("#### .5", "1/2"),
        ("#### 3/4", "3/4"),
        ("#### -6 / 8", "-3/4"),
        ("#### 50%", "50"),
        ("#### $1,250.50", "2501/2"),
        ("#### -$3", "-3"),
        ("#### 18 dollars", "18"),
        ("#### 5 km/h", "5"),
        ("#### 12 cm²", "12"),
        ("#### **42**", "42"),
        ("#### 1e3", "1000"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{\$50}", "50"),
        (r"\boxed{25\%}", "25"),
        (r"\boxed{-\frac{3}{4}}", "-3/4"),
        (r"\boxed{12\text{ pens}}", "12"),
        (r"$\boxed{7}$", "7"),
        # Without a mark, the last number counts.
        ("First 3, then 4, so 7.", "7"),
        ("It costs $1,000.50.", "2001/2"),
        ("42-8=34", "34"),
        ("8-3", "3"),
        ("(5)-3", "3"),
        ("it is -3 degrees", "-3"),
        ("answers: 3,4", "4"),
        ("it is 1/2 of it", "1/2"),
        ("x2 = 5kg", "5"),
        ("- 5 apples", "5"),
    ],
)
def test_parses(text, value):
    assert parse_number(text) == Fraction(value)


@pytest.mark.fast
@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        "####",
        "3 #### none",  # a mark without a number does not fall back to the last number
        "#### 3 or 4",
        "#### 3 4",
        "#### 3+4",
        "#### 9**9**9",
        "#### 9^9",
        "#### 4!",
        "#### (72)",
        "#### 1,23",
        "#### 1/0",
        "1/0",
        "#### 0x10",
        "#### 1e999999999",
        "#### ٣",
        "#### 3٤",
        "#### ٣/4",
        "#### 3/٤",
        "٣٤",
        "½ ² ③",
        "#### nan",
        "#### inf",
        "#### 7\x00",
        "#### " + "9" * 51,
        "1" * 51,
        "#### 5" + " x" * 200,
        r"\boxed{x = 5}",
    ],
)
def test_has_no_number(text):
    assert parse_number(text) is None
    assert numeric_reward({"answer": "#### 5"}, text) == Verdict(0.0, "invalid")


@pytest.mark.fast
def test_exact_comparison():
    problem = {"answer": "0.1+0.2 #### 0.30"}
    assert numeric_reward(problem, "#### 3/10") == Verdict(1.0, "ok")
    assert numeric_reward(problem, r"\boxed{0.3}") == Verdict(1.0, "ok")
    assert numeric_reward(problem, "#### 0.30000000000000004") == Verdict(0.0, "ok")
    assert numeric_reward(problem, "#### 0.3 #### 0.4") == Verdict(0.0, "ok")
    assert numeric_reward({"answer": "9" * 50}, "9" * 50) == Verdict(1.0, "ok")
    assert numeric_reward({"answer": "9" * 50}, "9" * 49 + "8") == Verdict(0.0, "ok")
    with pytest.raises(ValueError, match="reference answer 'many' has no number; correct"):
        numeric_reward({"answer": "many"}, "5")


MALICIOUS = {
    "import": "#### __import__('os').environ.setdefault('PWN','1')",
    "import in a list": "#### [__import__('os').environ.setdefault('PWN','1')]",
    "power": "#### 9**9**9**9",
    "10 MB of digits": "7" * 10_000_000,
    "10 MB after a mark": "#### " + "7" * 10_000_000,
    "10 MB before a wrong answer": "72 " * 3_000_000 + "#### 73",
    "parentheses": "#### " + "(" * 100_000 + "72" + ")" * 100_000,
    "braces": r"\boxed" + "{" * 100_000 + "72" + "}" * 100_000,
    "boxes": r"\boxed{" * 100_000 + "73",
    "units": "#### 72" + " a" * 1_000 + "!",
    "spaces": "#### 72" + " " * 1_900 + "!",
    "commas": "#### " + "1,111" * 400 + "!",
    "fractions": r"#### \frac{" * 300,
    "NUL": "#### 72\x00",
    "unicode digits": "#### 𝟕𝟐",
    "delimiters": "#### 72 #### 72 ####",
    "two answers": "#### 72 73",
    "surrogate": "#### \ud800",
}


@pytest.mark.fast
@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_answers_score_nothing_and_cost_nothing(name):
    start = time.perf_counter()
    verdict = numeric_reward({"answer": "#### 72"}, MALICIOUS[name])
    assert time.perf_counter() - start < 0.1
    assert verdict.score == 0.0 and not verdict.failed
    assert "PWN" not in os.environ
