import os
import time
from fractions import Fraction

import pytest

from jaxrl_stable.rewards import Verdict, numeric_reward, parse_number
from jaxrl_stable.rewards.numeric import parse_reference
from tests.rewards.written_expressions import EXPRESSIONS, FORMS
from tests.rewards.written_numbers import KINDS


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
        ("it is -3 degrees", "-3"),
        ("it is 1/2 of it", "1/2"),
        ("x2 = 5kg", "5"),
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
    "delimiters": "#### 72 #### 73 ####",
    "two answers": "#### 72 73",
    "two boxes": r"\boxed{72} or \boxed{73}",
    "towers": "#### 10^10^10",
    "large exponent": r"\boxed{72 \times 10^{999999999}}",
    "10 MB of carets": "^" * 10_000_000,
    "carets": "10" + "^10" * 600,
    "degrees": "{^" * 1_000 + "72",
    "tags": "<a>" * 600 + "72 million",
    "hyphens": "a-a'" * 500 + "(72",
    "equations": "1=" * 900 + "72",
    "texts": r"\text{" * 300 + "72",
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


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_as_people_and_models_write_them(kind):
    """Every plain number is read; everything else is read right or invalid."""
    for text, value in KINDS[kind].items():
        number = parse_number(text)
        if value is None:
            assert number is None, text
        elif not value.endswith("?") or number is not None:
            assert number == Fraction(value.rstrip("?")), text


@pytest.mark.fast
@pytest.mark.parametrize("form", FORMS)
def test_an_expression_is_no_number(form):
    read = {text: parse_number(form.replace("%s", text)) for text in EXPRESSIONS}
    assert {text: number for text, number in read.items() if number is not None} == {}


@pytest.mark.fast
def test_a_dash_that_begins_a_line_is_an_item_or_a_sign():
    assert parse_number("- 5 apples") is None
    assert parse_number("I have:\n- 5 apples") is None
    assert parse_number("#### - 5 apples") == parse_reference("- 5 apples") == -5


@pytest.mark.fast
def test_an_expression_is_no_reference():
    texts = [*EXPRESSIONS, *(text for kind in KINDS.values() for text, v in kind.items() if not v)]
    assert [text for text in texts if parse_reference(text) is not None] == []


@pytest.mark.fast
def test_a_number_is_read_from_the_text_around_it():
    """Solutions without a mark, as models write them."""
    solutions = {
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nSo 48+24 = <<48+24=72>>72 clips.": 72,
        "Weng earns 12/60 = $0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = $10.": 10,
        "So Betty needs $100 - $50 - $45 = $5 more.": 5,
        "James writes 3*2=6 pages a week, so he writes 6*52=624 pages a year.": 624,
        "Therefore, in total there are **35** flowers in Mark's garden.": 35,
        "Adding these up: 15 + 26 = 41.": 41,
        "So he made a profit of 200000-130000=$70,000": 70000,
        "So, Seattle, Charleston and Toulouse have 260 sheep together.": 260,
        "**Final Answer:** $694": 694,
        "### Final Answer\n18": 18,
        "Thus $n = 7$ is the smallest such integer.": 7,
        "The answer is $7$, since the sum is even.": 7,
        "The average is 5. I hope this helps you and is not confusing!": 5,
    }
    assert {text: parse_number(text) for text in solutions} == solutions


@pytest.mark.fast
def test_a_reference_is_the_only_number():
    for text in ("72", "The answer is 72.", "She has 72 clips.", "x = 72", "3+4=7 #### 72"):
        assert parse_reference(text) == 72
    assert parse_reference(r"so $\boxed{72}$ cm, which is half of it") == 72
    assert parse_reference(r"\boxed{72} is half of it") == 72
    assert parse_number(r"\boxed{72} is half of it") is None
    for text in ("3 boys have 72 clips", "3\n72", "She has 70 clips. Then 72.", "72" + " " * 2_000):
        assert parse_reference(text) is None, text


@pytest.mark.fast
@pytest.mark.parametrize("rest", range(1_985, 2_005))
def test_the_window_cuts_no_number_in_two(rest):
    """The last 2,000 characters may begin inside a number, or between its parts."""
    for text in ("13579", "3 1/2", "1 000", r"\frac{3}{4}", "1.5", "-5", "10^3"):
        assert parse_number(text + " " * rest) in (None, parse_number(text))
        assert parse_number(text + " really" * (rest // 7)) in (None, parse_number(text))
