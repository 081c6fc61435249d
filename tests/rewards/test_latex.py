import os
import time

import pytest

from jaxrl_stable.rewards import Verdict, check_references, load_reward

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


def test_a_failing_comparison_is_no_wrong_answer(monkeypatch):
    import math_verify

    from jaxrl_stable.rewards.latex import latex_reward

    def fail(*_):
        raise RuntimeError("sympy gave up")

    monkeypatch.setattr(math_verify.grader, "sympy_expr_eq", fail)
    with pytest.raises(RuntimeError, match="sympy gave up"):
        latex_reward({"answer": "1"}, r"\boxed{2}")


def test_unreadable_references_are_errors_and_found_before(reward):
    good = {"prompt": "", "answer": r"\boxed{1}"}
    bad = {"prompt": "", "answer": ""}
    assert reward([bad, good], [r"\boxed{1}"] * 2) == [Verdict(0.0, "error"), RIGHT]
    check_references([good], "math")
    with pytest.raises(ValueError, match=r"\[1\]: reward 'math' cannot read the reference"):
        check_references([good, bad], "math")
