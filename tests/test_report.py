import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_stable import metrics, report

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[2J\u202e'


def synthetic_run(workdir, steps=400, updates=4, layers=8):
    """A run as the training program records it, with curves of a plausible shape."""
    rng = np.random.default_rng(0)
    with metrics.MetricsWriter(workdir, console=False) as writer:
        for step in range(steps + 1):
            t = step / steps
            skill = 1 / (1 + math.exp(-8 * (t - 0.4)))
            if step % max(1, steps // 16) == 0:
                score = 0.08 + 0.8 * skill + rng.normal(0, 0.012)
                writer.write(
                    step,
                    {
                        "eval/avg_at_k": score,
                        "eval/avg_at_k_low": score - 0.05,
                        "eval/avg_at_k_high": score + 0.05,
                        "eval/pass_at_4": min(1.0, score + 0.1),
                    },
                )
            if step == 0:
                continue
            kl = 1.2e-3 * math.exp(1.3 * t + rng.normal(0, 0.25))
            load = 0.6 + 0.3 * rng.random()
            scalars = {
                "gradient_steps": step * updates,
                "mismatch/kl_k3": kl,
                "mismatch/kl_k1": kl + rng.normal(0, 6e-4),
                "mismatch/extreme_share": 0.4 * kl,
                "reward/mean": 0.05 + 0.85 * skill + rng.normal(0, 0.05),
                "entropy": 0.25 + 0.5 * math.exp(-3 * t) + rng.normal(0, 0.01),
                "response/length_mean": 40 + 60 * t + rng.normal(0, 3),
                "response/truncated_share": max(0, 0.12 - 0.2 * t + rng.normal(0, 0.01)),
                "weight/raw_max": math.exp(abs(rng.normal(0.6, 0.5))),
                "weight/over_cap_share": 2e-4 * rng.random(),
                "weight/ess": 0.99 - 0.05 * rng.random(),
                "clip/high_share": 0.004 * rng.random() + 0.002,
                "clip/low_share": 0.003 * rng.random(),
                "gradient/norm": math.nan if step == 77 else math.exp(rng.normal(-0.5, 0.3)),
                "gradient/skipped": float(step >= 77),
                "routing/agreement": 0.93 - 0.02 * rng.random(),
                "routing/differing_tokens_share": 0.4 + 0.1 * rng.random(),
                "experts/max_violation": load,
                "experts/idle_share": max(0.0, 0.1 * load - 0.06),
                "experts/confidence": 0.6 + 0.02 * load,
                "time/rollout": 2.2 + 0.3 * rng.random(),
                "time/reward": 0.3,
                "time/score": 0.6 + 0.1 * rng.random(),
                "time/update": 1.5 + 0.2 * rng.random(),
                "throughput/tokens_per_s": 5200 + 300 * rng.normal(),
                "something/new": 1.25,
            }
            for layer in range(layers):
                key = f"routing/agreement_layer_{layer:02d}"
                scalars[key] = 0.98 - 0.012 * layer - 0.01 * rng.random()
            writer.write(step, scalars)
            if step % 50 == 0:
                writer.samples(step, [_sample_row(rng, step, good) for good in (True, False)])
    (workdir / "config.gin").write_text("train.steps = 400\nlogger.api_key = 'hunter2'\n")
    facts = {
        "name": "MiniRL with R3 on letter reversal",
        "model": "169 k parameters, 2 layers, 8 experts, top-2",
        "objective": "MiniRL, ε 0.2/0.27, cap 5",
        "gain": {"value": 0.8, "low": 0.75, "high": 0.85},
    }
    (workdir / "summary.json").write_text(json.dumps(facts))
    return workdir


def _sample_row(rng, step, good):
    tokens = ["The", " letters", " of", " “abcde”", ",\n", "read", " back", "wards", ":", " <b>"]
    tokens += [*("edcba" if good else "edbca"), "</b>", EVIL if step == 400 else "."]
    return {
        "prompt": "Reverse the letters: abcde",
        "response": "".join(tokens),
        "answer": "edcba",
        "score": float(good),
        "status": "ok",
        "advantage": 0.5 if good else -0.5,
        "tokens": tokens,
        "log_weight": rng.normal(0, 0.15, len(tokens)),
        "clipped": rng.random(len(tokens)) < 0.15,
        "differs": rng.integers(0, 4, len(tokens)) * (rng.random(len(tokens)) < 0.3),
    }


class Page(html.parser.HTMLParser):
    """Tags and attributes of a page, and whether every tag that is opened is closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = synthetic_run(tmp_path_factory.mktemp("run"))
    path = report.write_report(workdir)
    return path, path.read_text(encoding="utf-8")


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


def test_plots_are_made_and_every_reference_inside_them_resolves(written):
    path, text = written
    names = {p.stem for p in (path.parent / "plots").glob("*.png")}
    assert names == {panel.name for panel in report.PANELS}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (path.parent / "plots").glob("*.png"))
    figures = text.split("<figure>")[1:]
    titles = [re.search(r'aria-label="([^"]*)"', figure)[1] for figure in figures]
    assert titles == [panel.title for panel in report.PANELS], "the paper's four come first"
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= set(ids)


def test_header_has_the_key_figures(written):
    _, text = written
    run = report.read_run(written[0].parent)
    first, last = (run.series("eval/avg_at_k")[1][i] for i in (0, -1))
    assert f"{first:.3f} → {last:.3f}" in text
    assert "<b>+80.0</b><small>95 %: +75.0 to +85.0</small>" in text, "gain from summary.json"
    assert "<b>400</b><small>1,600 updates</small>" in text
    assert "<small>Skipped updates</small><b>1</b>" in text
    assert "<dt>objective</dt><dd>MiniRL, ε 0.2/0.27, cap 5</dd>" in text


def test_points_gained_follow_from_the_metrics_when_there_is_no_summary(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        for step, score in ((0, 0.25), (10, 0.5), (20, 0.75)):
            writer.write(step, {"eval/avg_at_k": score})
    text = report.write_report(tmp_path).read_text()
    assert "0.250 → 0.750" in text
    assert "<b>+50.0</b>" in text


def test_unknown_metrics_are_listed_and_secrets_left_out(written):
    _, text = written
    other = text.split("Other metrics")[1]
    assert re.findall(r"<code>(.*?)</code>", other) == ["something/new"]
    assert "hunter2" not in text
    assert "train.steps = 400" in text


def test_values_outside_the_healthy_range_are_flagged(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        writer.write(1, {"weight/ess": 0.9, "mismatch/kl_k3": 0.4, "entropy": math.nan})
    text = report.write_report(tmp_path).read_text()
    verdicts = dict(
        re.findall(r"<code>([^<]*)</code></td><td[^>]*>[^<]*</td><td><b[^>]*>(\w+)", text)
    )
    assert verdicts["weight/ess"] == "ok"
    assert verdicts["mismatch/kl_k3"] == "look"
    assert '<code>entropy</code></td><td class="n">not finite' in text


def test_tokens_carry_their_figures():
    row = {
        "tokens": ["a<", "b", "c"],
        "log_weight": [math.log(1.5), None, -5.0],
        "clipped": [False, True, False],
        "differs": [0, 1, 3],
    }
    first, second, third = re.findall(r"<span.*?</span>", report._response(row))
    assert 'data-t="weight 1.5"' in first
    assert "--warm" in first
    assert "a&lt;" in first
    assert (
        'class="t clipped routed" style="" data-t="clipped · experts differ in 1 layer"' in second
    )
    assert "--cool),0.60" in third
    assert "experts differ in 3 layers" in third


def test_long_samples_are_cut():
    row = {"tokens": ["x"] * 10_000, "log_weight": [0.1] * 10_000}
    assert "7,000 more tokens" in report._response(row)
    assert "80,000 more characters" in report._block("y" * 100_000)


@pytest.mark.fast
def test_series_merge_rows_and_use_gradient_steps(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        writer.write(0, {"eval/avg_at_k": 0.1})
        for step in range(1, 5):
            writer.write(step, {"x": step if step != 2 else math.nan, "gradient_steps": 8 * step})
        writer.write(4, {"eval/avg_at_k": 0.2, "x": -4})
    run = report.read_run(tmp_path)
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4]
    x, y = run.series("x")
    np.testing.assert_array_equal(x, [8, 16, 24, 32])
    np.testing.assert_array_equal(y, [1, np.nan, 3, -4])
    np.testing.assert_array_equal(run.series("eval/avg_at_k")[0], [0, 32])


@pytest.mark.fast
def test_thin_keeps_spikes_and_smooth_keeps_constants():
    x = np.arange(50_000.0)
    y = np.sin(x / 5000)
    y[31_337], y[41_111], y[100] = 99.0, -99.0, np.nan
    thin_x, thin_y = report.thin(x, y)
    assert len(thin_x) <= report.POINTS
    assert (np.nanmin(thin_y), np.nanmax(thin_y)) == (-99, 99)
    assert (thin_x[0], thin_x[-1]) == (0, 49_999)
    values = np.full(100, 0.3)
    values[50] = np.nan
    np.testing.assert_allclose(report.smooth(values), 0.3)
    ramp = np.arange(100.0)
    np.testing.assert_allclose(report.smooth(ramp)[10:-10], ramp[10:-10])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such directory"),
        ({}, "metrics.jsonl: missing or empty"),
        ({"metrics.jsonl": ""}, "metrics.jsonl: missing or empty"),
        ({"metrics.jsonl": '{"step": 1}\n[]\n{"step": 2}\n'}, "metrics.jsonl, line 2"),
        ({"metrics.jsonl": '{"loss": 1}\n'}, "a row has no step"),
        ({"metrics.jsonl": '{"step": 1}\n', "summary.json": "[1]"}, "summary.json: not a JSON"),
    ],
)
def test_errors_are_one_line(tmp_path, files, message):
    workdir = tmp_path / "run"
    if files is not None:
        workdir.mkdir()
        for name, content in files.items():
            (workdir / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        report.write_report(workdir)
    assert "\n" not in str(error.value)


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
        f"report: {tmp_path / 'none'}: no such directory; give the workdir of a training run\n"
    )


def test_importing_the_report_leaves_the_flag_to_the_training_program():
    code = (
        "from absl import flags; import jaxrl_stable.report; "
        "flags.DEFINE_string('workdir', None, '')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
