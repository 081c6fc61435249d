import re
import subprocess
import sys

import pytest

from jaxrl_stable import report
from jaxrl_stable.report.__main__ import main
from jaxrl_stable.run import writer as metrics
from tests.html_page import Page


def test_the_page_is_one_file_that_loads_nothing(written):
    _, text = written
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|javascript:|<link|<iframe", text, re.IGNORECASE)
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "link", "iframe", "object", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("#"), (tag, name, value)
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_model_output_is_escaped(written):
    _, text = written
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "␛[2J\\u202e" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)


def test_header_has_the_key_figures(written):
    _, text = written
    run = report.read_run(written[0].parent)
    first, last = (run.series("eval/avg_at_k")[1][i] for i in (0, -1))
    assert f"<small>Held-out reward</small><b>{2 * first:.3f} → {2 * last:.3f}" in text
    assert f"<small>Held-out avg@8</small><b>{first:.3f} → {last:.3f}" in text
    assert "<b>+80.0</b><small>95 %: +75.0 to +85.0</small>" in text, "gain from summary.json"
    assert "<b>400</b><small>1,600 updates</small>" in text
    assert "<small>Wall time</small><b>1 h 2 min</b>" in text
    assert "<small>Skipped updates</small><b>1</b>" in text
    assert "<dt>objective</dt><dd>MiniRL, ε 0.2/0.27, cap 5</dd>" in text
    assert "<dt>parameters</dt><dd>168,960</dd>" in text
    assert "<dt>devices</dt><dd>cuda:0, cuda:1</dd>" in text


def test_points_gained_follow_from_the_metrics_when_there_is_no_summary(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        for step, score in ((0, 0.25), (10, 0.5), (20, 0.75)):
            writer.write(step, {"eval/avg_at_k": score})
    text = report.write_report(tmp_path).read_text()
    assert "0.250 → 0.750" in text
    assert "<b>+50.0</b>" in text


def test_one_evaluation_is_a_score_but_no_gain(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        writer.write(0, {"eval/avg_at_k": 0.25})
    text = report.write_report(tmp_path).read_text()
    assert "<b>0.250</b>" in text
    assert "Points gained" not in text


def test_secrets_are_left_out(written):
    _, text = written
    assert "hunter2" not in text
    assert "train.steps = 400" in text


def test_program(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2, "cost_in_$_and_$": 1}\n')

    def run(workdir):
        command = [sys.executable, "-m", "jaxrl_stable.report", f"--workdir={workdir}"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'report.html'}\n")
    failed = run(tmp_path / "none")
    assert failed.returncode == 1
    assert failed.stderr == (
        f"report: {tmp_path / 'none'} is not a directory; use the --workdir of a training run\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --workdir"),
        (["--workdir=none", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"report: {message} (") and "--help lists the arguments" in said


def test_help_lists_the_arguments(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    said = capsys.readouterr()
    assert exit.value.code == 0 and said.err == ""
    assert "--workdir DIR" in said.out


def test_importing_the_report_defines_no_flag():
    code = (
        "from absl import flags; before = set(flags.FLAGS); import jaxrl_stable.report; "
        "assert set(flags.FLAGS) == before; flags.DEFINE_string('workdir', None, '')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
