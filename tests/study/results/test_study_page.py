import json
import re

import numpy as np
import pytest

from jaxrl_stable.study.results import page, panels
from tests.html_page import Page
from tests.study.results.study_records import cell, record, study

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    rows = [*study(3), *cell(EVIL, 2, figure=("own",), mini_batches=3)]
    (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {
        "cell": EVIL,
        "step": 3,
        "prompt": EVIL,
        "tokens": ["1", EVIL],
        "log_weight": [0.1, -0.7],
        "clipped": [False, True],
        "differs": [[0, 3], []],
    }
    (directory / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    evidence = {
        "rows": [{"setting": "int8 & R3", "kl_step0": 0.0031, "bytes_per_token": 16}],
        "replay_cost": {"bytes": "4 · 4 · 1"},
    }
    (directory / "evidence.json").write_text(json.dumps(evidence))
    extra = {"title": "A <study>", "figures": {"own": "Our own"}, "about": ["one & two"]}
    (directory / "study.json").write_text(json.dumps(extra))
    return page.write_page(directory).read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_escapes_names(written):
    parsed = Page(written)
    assert not re.search(r"https?:|//[a-z]|@import|javascript:|<script", written, re.IGNORECASE)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "img", "link", "iframe", "object", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("#")
    (policy,) = [a["content"] for _, a in parsed.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert "<h1>A &lt;study&gt;</h1>" in written
    assert "one &amp; two" in written


def test_references_inside_the_page_resolve(written):
    ids = re.findall(r' id="([^"]+)"', written)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', written)) <= set(ids)


def test_every_cell_is_in_its_figures_legend_and_table(written):
    titles = ("Our own", "On-policy (Fig. 1)", "Four mini-batches per rollout (Fig. 3)")
    assert re.findall(r"<h2>(.*?)</h2>", written)[:3] == list(titles), "those of study.json first"
    sections = dict(zip(titles, written.split('<section id="figure-')[1:]))
    for title, name in (
        (titles[1], "MiniRL + R3, length norm"),
        (titles[2], "N=4, &lt;clip&gt; &amp; no replay"),
        (titles[0], "&lt;script&gt;alert(1)&lt;/script&gt;"),
    ):
        assert sections[title].split("</ol>")[0].count(name) == 1
        assert sections[title].split("<table>")[1].count(name) == 1
    assert sections[titles[1]].count("<figure>") == 6
    assert "MiniRL" not in sections[titles[0]].split("</section>")[0]


def test_figures_of_the_table(written):
    table = written.split('<section id="figure-1"')[1].split("<tbody>")[1]
    rows = dict(re.findall(r"</svg> (.*?)</span></td>(.*?)</tr>", table))
    assert "3 of 3<br><small>29 to 100 %</small>" in rows["MiniRL − IS"]
    assert "0 of 3<br><small>0 to 71 %</small>" in rows["MiniRL"]
    assert ">12.5</span>" in rows["MiniRL"]


def test_claims_evidence_and_samples(written):
    assert re.search(r'<b class="good">✓ reproduced</b>', written)
    claims = written.split('<section id="claims"')[1]
    assert "claims not run</summary>" in claims
    assert "no cell with mini_batches=2, replay=R2" in claims
    assert "least possible 0.25" in claims, "with three pairs"
    replay = written.split('<section id="replay"')[1]
    assert "int8 &amp; R3" in replay
    assert ">0.0031</span>" in replay
    assert 'data-t="weight 1.11 · experts differ in layers 0, 3"' in written


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "results.jsonl: missing or empty"),
        ({"results.jsonl": "[]\n{}\n"}, "line 1: not a JSON object"),
        ({"results.jsonl": '{"cell": "a"}\n'}, "record 1: no curves"),
        (
            {"results.jsonl": json.dumps(record("a")), "study.json": '{"collapse": {"limit": 1}}'},
            "study.json, collapse: .*limit",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        page.write_page(tmp_path)
    assert "\n" not in str(error.value)


def test_the_png_and_a_study_of_one_short_run(tmp_path):
    rows = [record("cost in $_and_$", steps=8)]
    path = page.write_figure(rows, "one", tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="'two': no record belongs to it"):
        page.write_figure(rows, "two", path)
    rows[0]["figure"] = []
    rows[0]["evaluations"] = {"gradient_steps": [], "score": []}
    rows[0]["curves"]["kl"] = [None, None]
    text = page.page(rows, {}, {}, [])
    assert "<h2>other</h2>" in text
    assert not re.search(r">\s*nan", text, re.IGNORECASE)


@pytest.mark.fast
def test_numbers_of_lines_move_apart_as_little_as_needed():
    assert panels.spread_out({}, 0.1) == {}
    apart = panels.spread_out({0: 0.5, 1: 0.9, 2: 0.5}, 0.1)
    assert apart == pytest.approx({0: 0.45, 2: 0.55, 1: 0.9})
    crowd = panels.spread_out(dict.fromkeys(range(20), 1.0), 0.1)
    gaps = np.diff(sorted(crowd.values()))
    assert gaps.min() == pytest.approx(1 / 19)
    assert (min(crowd.values()), max(crowd.values())) == pytest.approx((0, 1))


@pytest.mark.fast
def test_eighteen_cells_have_eighteen_looks():
    looks = {json.dumps(panels.look(index)) for index in range(18)}
    assert len(looks) == 18
    assert [panels.look(i)["linestyle"] for i in range(6)] == ["solid"] * 6
