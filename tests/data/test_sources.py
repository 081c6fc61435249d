import json

import grain
import pytest

from jaxrl_stable import data

GOOD = '{"prompt": "1+1?", "answer": "#### 2", "level": 3}'


def write(tmp_path, *lines):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


@pytest.mark.fast
def test_reads_problems_and_leaves_out_other_fields(tmp_path):
    # U+2028 ends a line in str.splitlines, but not in JSON lines.
    odd = json.dumps({"prompt": "a\u2028b", "answer": "é"}, ensure_ascii=False)
    source = data.JsonlSource(write(tmp_path, GOOD, "", "  ", odd, ""))
    assert len(source) == 2
    assert source[0] == {"prompt": "1+1?", "answer": "#### 2"}
    assert source[1] == {"prompt": "a\u2028b", "answer": "é"}
    with pytest.raises(IndexError, match="no item 2"):
        source[2]
    assert isinstance(source, grain.sources.RandomAccessDataSource)


def test_repr_names_file_and_content_but_no_directory(tmp_path):
    first = repr(data.JsonlSource(write(tmp_path, GOOD)))
    (tmp_path / "b").mkdir()
    assert repr(data.JsonlSource(write(tmp_path / "b", GOOD))) == first
    assert repr(data.JsonlSource(write(tmp_path, GOOD.replace("2", "3")))) != first
    assert first.startswith("JsonlSource('train.jsonl', size=1, crc32=")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"line 3: not JSON \(.*write one JSON object per line"),
        ('{"prompt": ' + "[" * 100_000, r"line 3: not JSON \("),
        ("[1]", "line 3: expected a JSON object, found array"),
        ("null", "line 3: expected a JSON object, found null"),
        (
            '{"prompt": "a", "reply": "b"}',
            "line 3: field 'answer' is missing .present: 'prompt', 'reply'.; add",
        ),
        ("{}", "line 3: field 'prompt' is missing .present: none."),
        (
            '{"prompt": "a", "answer": 72}',
            "line 3: field 'answer' is a number, expected a string; put it in quotes",
        ),
        (
            '{"prompt": ["a"], "answer": "b"}',
            "line 3: field 'prompt', message 1: expected a role",
        ),
        (
            '{"prompt": true, "answer": "b"}',
            "line 3: field 'prompt' is a boolean",
        ),
        ('{"prompt": " ", "answer": "b"}', "line 3: field 'prompt' is empty; fill"),
        ('{"prompt": "a", "answer": ""}', "line 3: field 'answer' is empty"),
        (b'{"prompt": "\xff", "answer": "b"}', "line 3: byte 13 is not UTF-8; save"),
    ],
)
def test_faults_name_file_line_and_field(tmp_path, line, message):
    path = write(tmp_path, GOOD, "", line, GOOD, "oops")
    with pytest.raises(ValueError, match=message) as caught:
        data.JsonlSource(path)
    assert str(caught.value).startswith(f"{path}, ")
    assert "faulty lines in this file: 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fast
def test_the_home_directory_and_buckets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    assert len(data.JsonlSource("~/mine.jsonl")) == 1
    with pytest.raises(ValueError, match=r"JsonlSource\.path is 'gs://bucket/x', but only paths"):
        data.JsonlSource("gs://bucket/x")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such data set; check the path"):
        data.JsonlSource(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"train\.jsonl: empty data set; write"):
        data.JsonlSource(write(tmp_path, "", " "))


def test_subset(source):
    part = data.subset(source, 50, 60)
    assert len(part) == 10
    assert part[9] == source[59]
    assert repr(part) == f"{source!r}[50:60]"
    with pytest.raises(IndexError):
        part[10]
    with pytest.raises(IndexError):
        part[-1]
    for start, stop in ((5, 5), (-1, 3), (0, 61)):
        with pytest.raises(ValueError, match="is empty or outside it"):
            data.subset(source, start, stop)


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    make = lambda options: data.ReasoningGymSource("chain_sum", 5, seed=3, options=options)  # noqa: E731
    source = make({"min_terms": 2, "max_terms": 2})
    again = make((("max_terms", 2), ("min_terms", 2)))  # as gin passes them
    assert [source[i] for i in range(5)] == [again[i] for i in range(5)]
    assert repr(source) == repr(again)
    assert "options={'max_terms': 2, 'min_terms': 2}" in repr(source)
    terms = source[0]["prompt"].split(":")[1].split("=")[0].split()
    sign = {"+": 1, "-": -1}[terms[1]]
    assert int(source[0]["answer"]) == int(terms[0]) + sign * int(terms[2])
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("gdc", {}, "no task 'gdc'; did you mean 'gcd'"),
        ("gcd", {"most": 3}, "task 'gcd': .*'most'; correct `options`"),
        ("gcd", {"min_numbers": 5, "max_numbers": 1}, "task 'gcd': max_numbers must be >="),
        ("propositional_logic", {}, r"propositional_logic.*\[0\] has no reference answer"),
    ],
)
def test_reasoning_gym_faults(task, options, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        data.ReasoningGymSource(task, 5, options=options)


def test_reasoning_gym_absent(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxrl_stable\[tasks\]'"):
        data.ReasoningGymSource("gcd", 5)


def test_worked_solutions_can_be_the_answer():
    pytest.importorskip("reasoning_gym")
    bare = data.ReasoningGymSource("gsm_symbolic", 8)
    worked = data.ReasoningGymSource("gsm_symbolic", 8, solution="answer_cot")
    for i in range(8):
        assert worked[i]["prompt"] == bare[i]["prompt"]
        result = worked[i]["answer"].split("####")[-1].strip()
        assert float(result) == float(bare[i]["answer"])
        assert len(worked[i]["answer"]) > len(bare[i]["answer"]) + 10
    assert repr(worked) != repr(bare)
    with pytest.raises(ValueError, match=r"has no 'steps'; its metadata has .*answer_cot"):
        data.ReasoningGymSource("gsm_symbolic", 8, solution="steps")
