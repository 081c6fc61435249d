import codecs
import gzip
import json
import zlib

import grain
import pytest

from jaxrl_stable import data
from jaxrl_stable.checks import record_name

GOOD = '{"prompt": "1+1?", "answer": "#### 2", "level": 3}'


def write(tmp_path, *lines):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


@pytest.mark.fast
def test_reads_problems_with_all_their_fields(tmp_path):
    # U+2028 ends a line in str.splitlines, but not in JSON lines.
    odd = json.dumps({"prompt": "a\u2028b", "answer": "é"}, ensure_ascii=False)
    # In a problem, `messages` is the conversation of the prompt.
    chat = '{"prompt": "c", "answer": "d", "messages": ["x"], "tests": {"in": [1, null]}}'
    source = data.JsonlSource(write(tmp_path, GOOD, "", "  ", odd, "", chat))
    assert len(source) == 3
    assert source[0] == {"prompt": "1+1?", "answer": "#### 2", "level": 3}
    assert source[1] == {"prompt": "a\u2028b", "answer": "é"}
    assert source[2] == {"prompt": "c", "answer": "d", "tests": {"in": [1, None]}}
    lines = [record_name(source, i) for i in range(3)]
    assert lines == [f"{tmp_path / 'train.jsonl'}, line {number}" for number in (1, 4, 6)]
    with pytest.raises(IndexError, match="no item 3"):
        source[3]
    assert isinstance(source, grain.sources.RandomAccessDataSource)


def test_repr_names_file_and_content_but_no_directory(tmp_path):
    first = repr(data.JsonlSource(write(tmp_path, GOOD)))
    (tmp_path / "b").mkdir()
    assert repr(data.JsonlSource(write(tmp_path / "b", GOOD))) == first
    assert repr(data.JsonlSource(write(tmp_path, GOOD.replace("2", "3")))) != first
    # Old checkpoints have this text.
    assert first == f"JsonlSource('train.jsonl', size=1, crc32={zlib.crc32(GOOD.encode()):08x})"


@pytest.mark.fast
@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl"])
def test_compressed_files_and_byte_order_marks(tmp_path, name):
    content = f"{GOOD}\n\n{GOOD}\n".encode()
    (tmp_path / "plain.jsonl").write_bytes(content)
    plain = data.JsonlSource(tmp_path / "plain.jsonl")
    path = tmp_path / name
    path.write_bytes(gzip.compress(content))
    packed = data.JsonlSource(path)
    assert [packed[i] for i in range(2)] == [plain[i] for i in range(2)]
    assert packed.where(1) == f"{path}, line 3"
    # The identity does not depend on the time that gzip stores.
    first = repr(packed)
    path.write_bytes(gzip.compress(content, mtime=1))
    assert repr(data.JsonlSource(path)) == first
    assert first == repr(plain).replace("plain.jsonl", name)
    for marked in (codecs.BOM_UTF8 + content, gzip.compress(codecs.BOM_UTF8 + content)):
        path.write_bytes(marked)
        assert data.JsonlSource(path)[0] == plain[0]


def test_damaged_and_foreign_encodings(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(f"{GOOD}\n".encode() * 99)[:-12])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged gzip file \(.*download it again"):
        data.JsonlSource(path)
    path.write_bytes(gzip.compress(f"{GOOD}\noops".encode()))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 2: not JSON"):
        data.JsonlSource(path)
    path.write_text(GOOD, encoding="utf-16")
    with pytest.raises(ValueError, match="line 1: byte 1 is not UTF-8; save the file in that"):
        data.JsonlSource(path)


@pytest.mark.fast
def test_several_files_are_one_source(tmp_path):
    for name, size in (("a", 2), ("b", 3)):
        line = json.dumps({"prompt": name, "answer": "1"})
        (tmp_path / f"{name}.jsonl").write_text("\n" + f"{line}\n" * size)
    paths = [str(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"]
    both = data.open_source(paths)
    single = [data.JsonlSource(path) for path in paths]
    assert [both[i]["prompt"] for i in range(len(both))] == ["a", "a", "b", "b", "b"]
    assert [record_name(both, i) for i in (1, 2, 4)] == [
        f"{paths[0]}, line 3",
        f"{paths[1]}, line 2",
        f"{paths[1]}, line 4",
    ]
    assert repr(both) == f"({single[0]!r} + {single[1]!r})"
    assert repr(data.open_source(tuple(reversed(paths)))) != repr(both)
    part = data.subset(both, 1, 4)
    assert (part[1]["prompt"], part.where(1)) == ("b", f"{paths[1]}, line 2")
    for index in (5, -1):
        with pytest.raises(IndexError):
            both[index]
    assert isinstance(both, grain.sources.RandomAccessDataSource)
    # One file in a list is that file: its checkpoints stay valid.
    assert repr(data.open_source(paths[:1])) == repr(data.open_source(paths[0])) == repr(single[0])
    mixed = data.open_source([single[0], paths[1]])
    assert repr(mixed) == repr(both)
    problems = [{"prompt": "x", "answer": "y"}]
    assert data.open_source(problems) is problems
    with pytest.raises(ValueError, match="the list of data files is empty; name at least one"):
        data.open_source([])


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
        (
            r'{"prompt": "ab \ud83d c", "answer": "b"}',
            r"line 3: field 'prompt' has half of a surrogate pair, \\ud83d, as character 4; an",
        ),
        (r'{"prompt": "a", "answer": "\udc00"}', "line 3: field 'answer' has half of a surrogate"),
        (
            r'{"prompt": [{"role": "user", "content": "\udc00"}], "answer": "b"}',
            "line 3: field 'prompt', message 1, has half of a surrogate pair",
        ),
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
