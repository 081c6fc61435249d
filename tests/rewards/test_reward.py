import json

import pytest

from jaxrl_stable import data
from jaxrl_stable.rewards import (
    Reward,
    Verdict,
    check_references,
    load_reward,
    try_reward,
)


@pytest.mark.fast
def test_in_process_rewards():
    problems = [{"prompt": "", "answer": "#### 4"}, {"prompt": "", "answer": "b"}]
    with load_reward("numeric") as reward:
        assert reward.name == "numeric"
        assert reward(problems[:1] * 2, ["4", "5"]) == [Verdict(1.0, "ok"), Verdict(0.0, "ok")]
        assert reward([], []) == []
    assert load_reward("exact")(problems[1:], ["B"]) == [Verdict(1.0, "ok")]


@pytest.mark.fast
@pytest.mark.parametrize(
    "name", ["", "maths", "os.system", "a:b; c", "a b:c", ":f", "m:", "../m:f"]
)
def test_unknown_names(name):
    with pytest.raises(
        ValueError, match=r"choose numeric, exact, math or package\.module:function"
    ):
        load_reward(name)


def test_math_without_math_verify(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"pip install 'jaxrl_stable\[tasks\]'"):
        load_reward("math")


@pytest.mark.fast
def test_as_many_problems_as_responses():
    with pytest.raises(ValueError, match="'numeric': 1 problems but 2 responses; repeat"):
        load_reward("numeric")([{"answer": "1"}], ["1", "1"])


@pytest.mark.fast
def test_verdicts_of_a_failed_checker():
    failed = {"ok": False, "invalid": False, "timeout": True, "error": True}
    assert {status: Verdict(0.0, status).failed for status in failed} == failed


@pytest.mark.fast
def test_check_references(tmp_path):
    path = tmp_path / "a.jsonl"
    answers = ("#### 1", "#### two", "#### 3", "#### four")
    path.write_text("\n".join(json.dumps({"prompt": "a", "answer": a}) for a in answers))
    source = data.JsonlSource(path)
    check_references(source, "exact")
    check_references(source, "package.module:function")
    check_references(data.ArithmeticSource(100, steps=3), "numeric")
    with pytest.raises(ValueError, match="cannot read the reference answer '#### two'") as caught:
        check_references(source, "numeric")
    assert str(caught.value).startswith(f"{path}, line 2: reward 'numeric' ")
    assert "records affected: 2 of 4" in str(caught.value)
    assert "choose the reward 'math' if it is not a plain number" in str(caught.value)
    with pytest.raises(ValueError, match=r"\[1\]: reward 'numeric' .*'x\^2\+1'; .* 1 of 3"):
        check_references([{"answer": "3½"}, {"answer": "x^2+1"}, {"answer": "3½"}], "numeric")
    with pytest.raises(ValueError, match=r"\[0\]: reward 'exact' cannot read"):
        check_references([{"prompt": "", "answer": "####"}], "exact")


PROBLEM = {"prompt": "1+1?", "answer": "2", "tests": "assert"}


def test_a_reward_is_tried_with_the_reference_answer_and_with_no_response():
    seen = []

    def scorer(problems, responses):
        seen.extend(zip(problems, responses, strict=True))
        return [Verdict(0.5, "ok")]

    try_reward(Reward("test", scorer), PROBLEM)
    assert seen == [(PROBLEM, "2"), (PROBLEM, "")]
    try_reward(load_reward("numeric"), PROBLEM)  # an empty response is invalid: judged, not failed


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("reads_tests_of_other_name", "fails on its reference answer.*KeyError: 'unit_tests'"),
        ("indexes_the_response", "fails on an empty response.*IndexError: string index"),
    ],
)
def test_a_reward_that_cannot_judge_is_refused_with_its_exception(function, message):
    with (
        load_reward(f"tests.rewards.user_rewards:{function}") as reward,
        pytest.raises(ValueError, match=message) as caught,
    ):
        try_reward(reward, PROBLEM)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("asynchronous", "is async; a reward is called as a plain function"),
        ("batched", r"batched\(prompts, completions, answer\) cannot be called with \(problem, "),
        ("keyword_only", "cannot be called with .*: too many positional arguments"),
    ],
)
def test_functions_of_another_form_are_refused_when_they_are_loaded(function, message):
    with pytest.raises(ValueError, match=message):
        load_reward(f"tests.rewards.user_rewards:{function}")


def test_a_reward_states_from_which_score_a_response_is_right():
    with load_reward("tests.rewards.user_rewards:graded") as reward:
        assert reward.right_at == 8.0
    assert load_reward("numeric").right_at == 1.0
