import io
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import rich.console

from jaxrl_stable.run import writer as metrics


def _steps(path):
    return [row["step"] for row in metrics.read_jsonl(path)]


def _writer(tmp_path, **kwargs):
    return metrics.MetricsWriter(tmp_path, console=False, **kwargs)


@pytest.mark.fast
def test_rows_are_valid_json_and_readable_before_close(tmp_path):
    with _writer(tmp_path) as writer:
        values = {"a": np.float32(0.5), "b": np.array([2]), "c": math.nan, "d": -math.inf}
        writer.write(1, values)
        writer.samples(1, [{"response": "é\n\ud800", "log_weight": np.array([0.1, math.nan])}])
        (row,) = metrics.read_jsonl(tmp_path / "metrics.jsonl")
        (sample,) = metrics.read_jsonl(tmp_path / "samples.jsonl")

    def reject(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=reject)
    assert (row["a"], row["b"], row["c"], row["d"]) == (0.5, 2.0, None, None)
    assert row["time"] > 1.7e9, "unix seconds"
    assert sample == {"step": 1, "response": "é\n\ud800", "log_weight": [0.1, None]}


def test_an_array_is_not_a_scalar(tmp_path):
    with _writer(tmp_path) as writer, pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"):
        writer.write(1, {"loss": np.ones(2)})
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == []


@pytest.mark.fast
def test_resume_records_each_step_once(tmp_path):
    with _writer(tmp_path) as writer:
        for step in range(8):
            writer.write(step, {"x": step})
            writer.samples(step, [{"response": str(step)}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "x"')  # torn by a kill
    with _writer(tmp_path, start_step=5) as writer:
        for step in range(6, 10):
            writer.write(step, {"x": -step})
    rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["x"]) for row in rows] == [
        *((step, step) for step in range(6)),
        *((step, -step) for step in range(6, 10)),
    ]
    assert _steps(tmp_path / "samples.jsonl") == list(range(6))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
    ]


@pytest.mark.parametrize(("start_step", "kept"), [(0, [0]), (-1, [])])
def test_a_run_from_the_start_drops_old_rows(tmp_path, start_step, kept):
    with _writer(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {})
    _writer(tmp_path, start_step=start_step).close()
    assert _steps(tmp_path / "metrics.jsonl") == kept


def test_sigkill_loses_at_most_the_last_row(tmp_path):
    code = """
import sys
from jaxrl_stable.run import writer as metrics
writer = metrics.MetricsWriter(sys.argv[1], console=False)
for step in range(10**9):
    writer.write(step, {"x": 0.1})
    print(step, flush=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == 50:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = _steps(tmp_path / "metrics.jsonl")
    assert steps == list(range(len(steps)))
    assert len(steps) > 50
    _writer(tmp_path, start_step=20).close()
    assert _steps(tmp_path / "metrics.jsonl") == list(range(21))


@pytest.mark.parametrize("bad", ['{"step": 1', "[1]", "\x00\x00"])
def test_a_fault_before_the_last_line_names_file_and_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + bad + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not ") as error:
        _writer(tmp_path)
    assert "\n" not in str(error.value)
    assert bad in path.read_text(), "a damaged file is left as it is"


def test_a_row_without_step_is_an_error_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match=r"row 1: no integer 'step'"):
        _writer(tmp_path)


def test_an_interrupted_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    with _writer(tmp_path) as writer:
        writer.write(7, {})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        _writer(tmp_path, start_step=0)
    assert _steps(tmp_path / "metrics.jsonl") == [7]


def test_tensorboard_gets_the_values_and_the_purge_step(tmp_path):
    from tensorboardX.proto import event_pb2

    with _writer(tmp_path) as writer:
        writer.write(1, {"x": 0.25})
    _writer(tmp_path, start_step=4).close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2, "a restart within the same second keeps the first file"
    events = []
    for path in files:
        data = path.read_bytes()
        while data:  # TFRecord: length u64, crc u32, payload, crc u32
            length = int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values == [(1, "x", 0.25)]
    assert 5 in [e.step for e in events if e.HasField("session_log")]


SCALARS = {"reward/mean": 0.5, "mismatch/kl_k3_token_mean": 1e-3, "entropy": 0.7}


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    with metrics.MetricsWriter(tmp_path, total_steps=100) as writer:
        for step in range(1, 101):
            writer.progress(step, SCALARS)
        writer.show_sample("2+2 [/bold]", "[red]4[/red] :smile: \x1b[2J", 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("step 1/100  reward 0.500  KL 1.0e-03  entropy 0.700  tok/s –")
    assert lines[1].startswith("step 5/100")
    assert len(lines) == 1 + 20 + 2
    assert lines[-2:] == ["score 1  2+2 [/bold]", "  → [red]4[/red] :smile: ␛[2J"]


def test_bar_on_a_terminal(tmp_path):
    out = io.StringIO()
    with metrics.MetricsWriter(tmp_path, total_steps=3) as writer:
        writer._console = rich.console.Console(file=out, force_terminal=True, width=140)
        writer.progress(1, SCALARS)
        writer.show_sample("p", "[red]x[/red]\x1b]0;title\x07", 0.0)
        writer.progress(3, SCALARS)
    text = out.getvalue()
    assert "3/3" in text
    assert "1.0e-03" in text
    assert "[red]x[/red]␛]0;title␇" in text
    assert "\x1b]0;" not in text


def test_visible():
    assert metrics.visible("a\tb\nc\r\x00\x7f\x9b\u202e\u2028") == (
        "a\tb\nc\u240d\u2400\u2421\\u009b\\u202e\\u2028"
    )
    plain = "naïve 中文 👩\u200d🚀 ∑"
    assert metrics.visible(plain) == plain
