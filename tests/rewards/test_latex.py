import os
import time

import pytest

from jaxrl_stable.rewards import Reward, Verdict, check_references, load_reward
from jaxrl_stable.rewards.literal import boxed_reference, needs_parsing
from tests.rewards.written_math import PARTS, SCORES

pytest.importorskip("math_verify")

RIGHT, WRONG, INVALID = Verdict(1.0, "ok"), Verdict(0.0, "ok"), Verdict(0.0, "invalid")


@pytest.fixture(scope="module")
def reward():
    with load_reward("math", timeout_s=3.0) as reward:
        yield reward


@pytest.mark.parametrize(
    ("reference", "response", "verdict"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}", RIGHT),
        (r"\frac{1}{2}", r"so $\frac{2}{4}$.", RIGHT),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", RIGHT),
        ("72", "#### 72", RIGHT),
        ("work #### 72", r"\boxed{72}", RIGHT),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", RIGHT),
        ("[0,1)", r"\boxed{[0,1)}", RIGHT),
        ("72", r"\boxed{73}", WRONG),
        ("x+1", r"\boxed{x-1}", WRONG),
        ("[0,1)", r"\boxed{[0,1]}", WRONG),
        ("72", "no answer", INVALID),
        ("72", r"\boxed{72} million", INVALID),
        ("72", r"\boxed{72 73}", INVALID),
        ("72", r"\boxed{}", INVALID),
        ("72", r"\boxed{\frac{72}{1}", INVALID),
        (r"The sum is $40+32$, so it is $72$.", r"\boxed{72}", RIGHT),
        (r"The answer is $72$.", r"\boxed{72}", RIGHT),
        ("72", "", INVALID),
    ],
)
def test_math(reward, reference, response, verdict):
    assert reward([{"prompt": "", "answer": reference}], [response]) == [verdict]


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{__import__('os').environ.setdefault('PWN','1')}",
        "$[__import__('os').system('touch PWN')]$",
        r"\boxed{9^{9^{9^{9}}}}",
        "#### 9**9**9**9",
        r"\boxed{" + "(" * 900 + "72" + ")" * 900 + "}",
        r"\boxed{" * 100_000 + "72",
        "7" * 10_000_000,
        "#### 72\x00 73",
        r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
        r"\boxed{72} or \boxed{73}",
    ],
)
def test_malicious_answers_score_nothing(reward, response, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    (verdict,) = reward([{"prompt": "", "answer": "72"}], [response])
    assert time.perf_counter() - start < 6
    assert verdict.score == 0.0
    assert "PWN" not in os.environ and not list(tmp_path.iterdir())


def test_answers_as_people_and_models_write_them(reward):
    verdicts = reward(
        [{"answer": reference} for reference, _, _ in SCORES], [r for _, r, _ in SCORES]
    )
    wrong = [
        (case, verdict)
        for case, verdict in zip(SCORES, verdicts, strict=True)
        if verdict.score != case[2] or verdict.failed
    ]
    assert wrong == []


def test_a_reference_is_parsed_whole(reward):
    """In a box, the reference scores 1 and a part of it scores 0."""
    problems = [{"answer": reference} for reference, _ in PARTS]
    whole = reward(problems, [rf"\boxed{{{reference}}}" for reference, _ in PARTS])
    parts = reward(problems, [rf"\boxed{{{part}}}" for _, part in PARTS])
    scores = [(a.score, b.score) for a, b in zip(whole, parts, strict=True)]
    assert dict(zip(PARTS, scores, strict=True)) == dict.fromkeys(PARTS, (1.0, 0.0))
    check_references(problems, "math")


@pytest.mark.fast
def test_numbers_and_words_need_no_parser():
    simple = ("72", r"3\frac12", "#### 1,000", r"\text{Evelyn}", "12:30", r"0.\overline{3}", "$-5$")
    assert not any(map(needs_parsing, simple))
    assert all(map(needs_parsing, ("x+1", "(1,2)", r"\sqrt{2}", "", r"\frac{1}{2", "A")))
    assert boxed_reference("work\n#### x + 1") == r"\boxed{x + 1}"
    assert boxed_reference("$x=1$ and $y=2$") == r"\boxed{$x=1$ and $y=2$}"
    assert boxed_reference("$x=1$ then, as we saw, $y=2$") == ""


def test_references_that_cannot_be_read_are_named(reward):
    for bad in ("", "5 6", r"\frac{1}{2", r"\sqrt", "x" * 400, r"$-$\boxed{5}\pi"):
        with pytest.raises(ValueError, match=r"\]\[1\]: reward 'math' .* affected: 2 of 3"):
            check_references([{"answer": "x"}, {"answer": bad}, {"answer": bad}], "math")


def test_a_reference_that_is_not_equal_to_itself_is_refused(monkeypatch):
    from jaxrl_stable.rewards import latex

    monkeypatch.setattr(latex.math_verify, "verify", lambda *_, **__: False)
    with pytest.raises(ValueError, match="reference answer 'z\\+1' is not LaTeX"):
        latex.latex_reward({"answer": "z+1"}, r"\boxed{z+1}")


@pytest.mark.fast
def test_a_reference_that_does_not_score_1_in_a_box_is_refused(monkeypatch):
    zero = Reward("math", lambda problems, _: [Verdict(0.0, "ok")] * len(problems))
    monkeypatch.setattr("jaxrl_stable.rewards.reward.load_reward", lambda *_, **__: zero)
    with pytest.raises(ValueError, match=r"\]\[1\]: reward 'math' cannot read"):
        check_references([{"answer": "1"}, {"answer": "x"}], "math")


@pytest.mark.fast
def test_data_of_numbers_start_no_process(monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr("jaxrl_stable.rewards.reward.load_reward", fail)
    check_references([{"answer": "3+4=7 #### 7"}, {"answer": "Evelyn"}], "math")
    with pytest.raises(AssertionError):
        check_references([{"answer": "x+1"}], "math")


def test_a_failing_comparison_is_no_wrong_answer(monkeypatch):
    import math_verify

    from jaxrl_stable.rewards.latex import latex_reward

    def fail(*_):
        raise RuntimeError("sympy gave up")

    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", fail)
    with pytest.raises(RuntimeError, match="sympy gave up"):
        latex_reward({"answer": "x"}, r"\boxed{y}")


def test_unreadable_references_are_errors_and_found_before(reward):
    good = {"prompt": "", "answer": r"\boxed{1}"}
    bad = {"prompt": "", "answer": ""}
    assert reward([bad, good], [r"\boxed{1}"] * 2) == [Verdict(0.0, "error"), RIGHT]
    check_references([good], "math")
    with pytest.raises(ValueError, match=r"\[1\]: reward 'math' cannot read the reference"):
        check_references([good, bad], "math")
