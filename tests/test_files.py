"""JSON files, and writes that are complete or absent."""

import os
import stat

import pytest

from jaxrl_stable.files import read_json, read_jsonl, write_atomic

pytestmark = pytest.mark.fast


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_a_new_file_has_the_permissions_that_open_would_give(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_atomic(tmp_path / "new", "text")
        (tmp_path / "opened").write_text("text")
    finally:
        os.umask(old)
    assert mode(tmp_path / "new") == mode(tmp_path / "opened") == 0o666 & ~umask


def test_a_file_that_is_there_keeps_its_permissions(tmp_path):
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o640)
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and mode(path) == 0o640


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_lone_surrogates_are_escaped(tmp_path):
    write_atomic(tmp_path / "file", "a\ud800ä\n")
    assert (tmp_path / "file").read_bytes() == "a\\ud800ä\n".encode()


def test_a_torn_last_line_is_dropped_and_any_other_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a"')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(
        ValueError, match=r"rows\.jsonl, line 2: not JSON .*; fix or delete the line"
    ):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        read_jsonl(path)


def test_an_optional_object(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    for content, message in (("{", "not JSON"), ("[" * 100_000, "not JSON"), ("3", "not a JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(path)
