"""What is run, in which programs, and what is on disk, even after an interruption."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from jaxrl_stable import gin_files
from jaxrl_stable.advantages import gpg, with_conditions
from jaxrl_stable.array_tasks import ChainSum
from jaxrl_stable.files import read_jsonl
from jaxrl_stable.study import __main__ as study_program
from jaxrl_stable.study.config import ColdStart, Grid
from jaxrl_stable.study.records import append
from jaxrl_stable.study.results import analysis
from jaxrl_stable.study.results.claims import CLAIMS
from jaxrl_stable.study.results.evidence import replay_rows
from jaxrl_stable.study.results.page import read_records
from jaxrl_stable.study.results.verdicts import matches
from jaxrl_stable.study.runner import Member, plan, run_study

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(pathlib.Path(__file__).parent / "tiny.gin")


def runs_of(directory):
    return {(r["cell"], r["seed"]): r for r in read_jsonl(directory / "results.jsonl")}


@pytest.fixture(scope="module")
def small():
    """One program of two cells."""
    return gin_files.load([TINY], [], study_program.build)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The records, made by the program on two CPU devices, each with its own runs."""
    directory = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "jaxrl_stable.study", f"--gin_file={TINY}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "report: runs/tiny/report.html" in done.stdout
    return directory / "runs" / "tiny"


def test_records(small, finished):
    runs = runs_of(finished)
    names = "N=2, R3", "N=2, R3, no clip"
    assert set(runs) == {(name, seed) for name in names for seed in (0, 1)}
    for run in runs.values():
        assert run["curves"]["gradient_steps"] == [4, 8]
        assert run["evaluations"]["gradient_steps"] == [0, 4, 8]
        assert all(len(values) == 2 for values in run["curves"].values())
        assert all(0 <= score <= 1 for score in run["evaluations"]["score"])
        assert run["settings"]["replay"] == "R3" and run["figure"] == ["two"]
        assert all(kl > 0 for kl in run["first"]["kl"])
    clipped = [runs["N=2, R3, no clip", s]["curves"]["clipped"] for s in (0, 1)]
    assert not np.any(clipped)
    # Start, problems and random numbers are shared: cells differ in settings, seeds in luck.
    first = [runs[c, 0]["first"]["reward"][0] for c in ("N=2, R3", "N=2, R3, no clip")]
    assert first[0] == first[1]
    before = [runs["N=2, R3", s]["evaluations"]["score"][0] for s in (0, 1)]
    assert before[0] == runs["N=2, R3, no clip", 0]["evaluations"]["score"][0]
    assert len({str(run["curves"]["entropy"]) for run in runs.values()}) == 4


def test_report(finished):
    page = (finished / "report.html").read_text()
    assert "N=2, R3, no clip" in page and 'data-t="weight ' in page
    assert (finished / "two.png").read_bytes().startswith(b"\x89PNG")
    claims = (finished / "claims.md").read_text()
    assert all(claim.sentence in claims for claim in CLAIMS)


def test_samples(small, finished):
    """Every token of a response has its figures, and the listed layers exist."""
    rows = read_jsonl(finished / "samples.jsonl")
    assert len(rows) == 4 and {row["cell"] for row in rows} == {"N=2, R3"}
    for row in rows:
        assert len({len(row[k]) for k in ("tokens", "log_weight", "clipped", "differs")}) == 1
        assert all(layer in (0, 1) for layers in row["differs"] for layer in layers)
        assert any(row["log_weight"]) and row["response"].split() == [
            t.strip() for t in row["tokens"]
        ]
        prompt, answer = row["prompt"].split()[:-1], row["response"].split()
        right = sum(a == b for a, b in zip([*prompt[::-1], "<eos>"], answer))
        assert row["score"] == pytest.approx(right / max(len(prompt) + 1, len(answer)))


def test_nothing_is_run_twice(small, finished, tmp_path):
    """A run killed while writing, and a third seed, leave finished records as they are.

    The run whose line was torn is made again, here on one device, and comes out the same.
    """
    assert jax.device_count() == 1
    whole = (finished / "results.jsonl").read_bytes()
    (tmp_path / "study.json").write_bytes((finished / "study.json").read_bytes())
    (tmp_path / "results.jsonl").write_bytes(whole[:-40])
    kept = whole[: whole[:-40].rfind(b"\n") + 1]
    more = (*small.cold_starts, ColdStart(name="of no cell"))
    run_study(dataclasses.replace(small, seeds=3, cold_starts=more), tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(kept)
    runs, expected = runs_of(tmp_path), runs_of(finished)
    assert set(runs) == {(cell, seed) for cell, _ in expected for seed in (0, 1, 2)}
    for key, run in expected.items():
        for name, tolerance in (("reward", 0), ("entropy", 1e-3), ("kl", 2e-2)):
            got = runs[key]["curves"][name]
            np.testing.assert_allclose(got, run["curves"][name], rtol=tolerance, atol=1e-7)


def test_append_after_a_torn_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": ')
    append(path, [{"a": 2}])
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_another_study_is_refused(small, finished):
    other = dataclasses.replace(small, temperature=0.5)
    with pytest.raises(ValueError, match=r"different Study\.temperature; use another --workdir"):
        run_study(other, finished)
    other = dataclasses.replace(small, cold_starts=(ColdStart(steps=1),))
    with pytest.raises(ValueError, match=r"different Study\.cold_starts 'default'"):
        run_study(other, finished)


def test_records_of_other_settings_are_refused(small, finished, tmp_path):
    """Names omit the usual settings of their study, so the same name may mean other settings."""
    (tmp_path / "study.json").write_bytes((finished / "study.json").read_bytes())
    text = (finished / "results.jsonl").read_text().replace('"learning_rate": 0.01', '"other": 1')
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match="'N=2, R3' was run with other settings"):
        run_study(small, tmp_path)


def test_other_cold_starts_are_refused(small, finished, tmp_path):
    """With other libraries or another machine, equal seeds would no longer be pairs."""
    (tmp_path / "study.json").write_bytes((finished / "study.json").read_bytes())
    rows = read_jsonl(finished / "results.jsonl")
    rows[0]["evaluations"]["score"][0] += 0.25
    append(tmp_path / "results.jsonl", rows[:3])
    # A third seed: three runs are missing, so the programs are those of the test above.
    with pytest.raises(ValueError, match="cold start 'default' of seed 0 scores"):
        run_study(dataclasses.replace(small, seeds=3), tmp_path)


def test_the_study_decides_on_figures(finished, tmp_path):
    """study.json decides: records may be older than a figure, or than the removal of a cell."""
    (tmp_path / "results.jsonl").write_bytes((finished / "results.jsonl").read_bytes())
    about = json.loads((finished / "study.json").read_text())
    about["cells"] = {"N=2, R3": ["two", "later"]}
    (tmp_path / "study.json").write_text(json.dumps(about))
    records = read_records(tmp_path)
    assert {record["cell"] for record in records} == {"N=2, R3"} and len(records) == 2
    assert all(record["figure"] == ["two", "later"] for record in records)


def test_defaults_that_are_spelt_out_are_the_same_cell(study):
    grids = Grid(options=({},)), Grid(options=({"clip": True, "truncation": 5.0},), figure="x")
    (cell,) = dataclasses.replace(study, grids=grids).cells().items()
    assert cell[0] == "N=1" and cell[1].figures == ("x",)


def test_every_claim_finds_its_cells_in_the_grid():
    """The claims name settings; the paper's grid has a cell for each of them."""
    built = gin_files.load([str(ROOT / "experiments/paper/grid.gin")], [], study_program.build)
    cells = [
        analysis.CellRuns(name, cell.settings, cell.figures, ())
        for name, cell in built.cells().items()
    ]
    for claim in CLAIMS:
        for side in (side for comparison in claim.comparisons for side in comparison):
            assert any(matches(cell, side, claim) for cell in cells), (claim.id, side)


def test_plan_shares_programs(study):
    """Objectives that share their passes share one program; its waves have one size."""
    cells = study.cells()
    plans = plan(study, cells, (), 1)
    assert [len(waves) for waves in plans] == [1, 1]
    assert plans[1][0].cells == (
        "N=2, R3",
        "N=2, R3, no clip",
        "N=2, gspo, R3",
        "N=2, R3, careful",
    )
    members = [m for waves in plans for wave in waves for m in wave.members]
    assert len(members) == len(set(members)) == 5 * study.seeds
    few = dataclasses.replace(study, runs_at_a_time=3)
    waves = plan(few, cells, (Member("N=2, R3", 0),), 2)[1]
    assert [len(wave.members) for wave in waves] == [4, 3] and {wave.size for wave in waves} == {4}
    assert all(len(wave.padded) == 4 for wave in waves)
    assert Member("N=2, R3", 0) not in [m for wave in waves for m in wave.members]


def test_evidence(small, finished):
    """Replay carries one byte for each of two experts in each of two layers."""
    (row,) = replay_rows(runs_of(finished).values(), small)
    assert row["bytes_per_token"] == 4 and row["kl_step0"] > 0
    runs = [runs_of(finished)["N=2, R3", s] for s in (0, 1)]
    assert row["kl_step1"] == pytest.approx(np.mean([r["first"]["kl"][1] for r in runs]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gradient_steps=9), "must be a multiple of evaluations"),
        (dict(evaluations=8), "not a multiple of N = 2"),
        (dict(seeds=0), "Study.seeds is 0"),
        (dict(task=None), "Study.task is missing"),
        (dict(rollout_format="int3"), "Study.rollout_format is 'int3'"),
        (dict(grids=(Grid(cold_starts=("x",)),)), "Grid.cold_starts has 'x'"),
        (dict(grids=()), "at least one entry"),
        (dict(show=("N=3",)), "Study.show has 'N=3'"),
        (dict(cold_starts=(ColdStart(task=ChainSum()),)), "ColdStart.task has the vocabulary"),
        (dict(group_size=1), "Study.group_size is 1, but centered compares"),
        (
            dict(grids=(Grid(advantages=(with_conditions(lowest=0.5)(partial(gpg)),)),)),
            "Grid.advantages: gpg needs rewards of at least 0.5, but array tasks return 0 to 1",
        ),
    ],
)
def test_errors(study, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(study, **change)


def test_gin_file_and_losses():
    """Options that gin binds to a loss reach the cells; an unused binding is an error."""
    lines = [
        "study.Grid.losses = (@objectives.gspo,)",
        "study.Grid.options = ({},)",
        "study.Study.show = ()",
        "objectives.gspo.clip_high = 0.5",
    ]
    built = gin_files.load([TINY], lines, study_program.build)
    cell = built.cells()["N=2, gspo, R3, clip_high 0.5"]
    assert cell.settings["loss"] == "gspo" and cell.settings["clip_high"] == 0.5
    with pytest.raises(ValueError, match="nothing uses it"):
        gin_files.load([TINY], ["objectives.sapo.temperature_high = 2.0"], study_program.build)
