import json

import pytest

from jaxrl_stable import data
from jaxrl_stable.rewards import Verdict, check_references, load_reward


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
    assert str(caught.value).startswith(f"{source!r}[1]: reward 'numeric' ")
    assert "records affected: 2 of 4" in str(caught.value)
    with pytest.raises(ValueError, match=r"\[0\]: reward 'exact' cannot read"):
        check_references([{"prompt": "", "answer": "####"}], "exact")
