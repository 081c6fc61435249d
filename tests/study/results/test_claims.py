import dataclasses
import itertools

import numpy as np
import pytest

from jaxrl_stable.statistics import Estimate
from jaxrl_stable.study.config import PAPER, Collapse
from jaxrl_stable.study.results import verdicts
from jaxrl_stable.study.results.analysis import cells_of
from jaxrl_stable.study.results.claims import CLAIMS
from jaxrl_stable.study.results.markdown import claim_lines, write_claims
from jaxrl_stable.study.results.verdicts import (
    CONTRADICTED,
    NOT_RUN,
    OPEN,
    REPRODUCED,
    UNSEEN,
    evaluate,
    following,
    settings,
)
from tests.study.results.study_records import cell, study

CLAIM = {claim.id: claim for claim in CLAIMS}
NORM = {"aggregation": "seq-mean-token-mean"}


def judged(rows, *ids):
    """Returns the verdicts of the claims `ids` in their settings."""
    found = evaluate(cells_of(rows), claims=[CLAIM[i] for i in ids])
    return [row.verdict for row in found]


@pytest.mark.fast
def test_claims_are_well_formed():
    assert len(CLAIM) == len(CLAIMS)
    assert {c.expect for c in CLAIMS} == {
        "higher",
        "lower",
        "equal",
        "not higher",
        "stable",
        "open",
    }
    assert {c.outcome for c in CLAIMS} <= {"final", "peak", "area", "kl", "entropy", "survival"}
    for claim in CLAIMS:
        assert set(claim.same) | set(claim.free) <= set(PAPER)
        sides = {1 if claim.expect == "stable" else 2}
        assert {len(comparison) for comparison in claim.comparisons} <= sides
        for first, *second in claim.comparisons:
            assert [first] != second
        assert not claim.together or claim.expect != "stable"
    for n in (2, 4, 8):
        claim = CLAIM[f"n{n}-r2-r3"]
        better, worse = (side["replay"] for side in claim.comparisons[0])
        assert claim.sentence == f"N = {n}: {better} ends higher than {worse}."
        assert better == ("R2" if n == 2 else "R3")


def test_the_study_comes_out_as_it_was_made():
    found = {row.claim.id: row for row in evaluate(cells_of(study()))}
    verdict = {name: row.verdict for name, row in found.items()}
    assert verdict.pop("on-policy-best") == UNSEEN, "R3 is as good, within the noise"
    assert verdict.pop("vespo-stable") == UNSEEN, "it did not learn, and did not collapse"
    assert verdict.pop("clip-without-replay-n4-final") == OPEN
    assert verdict.pop("clip-without-replay-n4-survival") == OPEN
    assert found["clip-without-replay-n4-final"].note == "the first is lower"
    assert found["clip-without-replay-n4-survival"].note == "no difference visible"
    run = {name for name, kind in verdict.items() if kind != NOT_RUN}
    assert len(run) == 16
    assert {verdict[name] for name in run} == {REPRODUCED}
    assert found["n2-r2-r3"].note == "no cell with mini_batches=2, replay=R2"
    assert found["cold-starts"].note == "needs three cold starts"


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_labels_bear_out_nothing(seed):
    """Within each seed the runs of the cells are permuted, so no cell differs from another."""
    rows = study()
    rng = np.random.default_rng(seed)
    for _, group in itertools.groupby(sorted(rows, key=lambda r: r["seed"]), lambda r: r["seed"]):
        group = list(group)
        order = rng.permutation(len(group))
        parts = [(group[i]["curves"], group[i]["evaluations"]) for i in order]
        for row, (curves, evaluations) in zip(group, parts):
            row["curves"], row["evaluations"] = curves, evaluations
    compared = [r for r in evaluate(cells_of(rows)) if r.evidence and r.claim.expect != "stable"]
    assert len(compared) > 10
    assert {row.verdict for row in compared} <= {UNSEEN, OPEN}
    assert {row.note for row in compared} <= {"", "no difference visible"}


@pytest.mark.fast
def test_the_other_direction_contradicts():
    rows = [*cell("a", final=0.6), *cell("b", final=0.8, **NORM)]
    assert judged(rows, "on-policy-norm-score") == [CONTRADICTED]
    rows = [*cell("a", final=0.6), *cell("b", final=0.8, replay="R3")]
    assert judged(rows, "on-policy-r3-score", "on-policy-r3-kl") == [CONTRADICTED, UNSEEN]
    assert judged(cell("a", 10, collapse_at=100), "on-policy-stable") == [CONTRADICTED]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("expect", "low", "high", "verdict"),
    [
        ("higher", 0.01, 0.2, REPRODUCED),
        ("higher", -0.01, 0.2, UNSEEN),
        ("higher", -0.2, -0.01, CONTRADICTED),
        ("lower", 0.01, 0.2, CONTRADICTED),
        ("lower", -0.2, -0.01, REPRODUCED),
        ("equal", -0.04, 0.04, REPRODUCED),
        ("equal", -0.04, 0.06, UNSEEN),
        ("equal", 0.06, 0.1, CONTRADICTED),
        ("not higher", -0.1, 0.04, REPRODUCED),
        ("not higher", -0.1, 0.06, UNSEEN),
        ("not higher", 0.01, 0.04, CONTRADICTED),
        ("open", 0.5, 0.6, OPEN),
    ],
)
def test_the_rule(expect, low, high, verdict):
    interval = Estimate((low + high) / 2, low, high)
    assert verdicts.verdict(expect, interval, 0.01, 0.05) == verdict
    if verdict != OPEN:
        assert verdicts.verdict(expect, interval, 0.06, 0.05) == UNSEEN, "Holm decides as well"


@pytest.mark.fast
def test_few_seeds_are_not_enough():
    pair = [*cell("a", 1, final=0.9), *cell("b", 1, final=0.3, **NORM)]
    (row,) = evaluate(cells_of(pair), claims=[CLAIM["on-policy-norm-score"]])
    assert (row.verdict, row.note) == (NOT_RUN, "fewer than two seeds in common")
    assert judged(cell("a", 5), "on-policy-stable") == [UNSEEN], "0 of 5: up to 52 % may collapse"
    assert judged(cell("a", 6), "on-policy-stable") == [REPRODUCED]


@pytest.mark.fast
def test_seeds_are_paired():
    """A spread between seeds that both cells share does not hide a difference."""
    finals = np.linspace(0.3, 0.9, 8)
    a = cell("a", final=finals.tolist())
    b = cell("b", final=(finals - 0.05).tolist(), **NORM)
    assert judged(a + b, "on-policy-norm-score") == [REPRODUCED]
    (row,) = evaluate(cells_of(a[1:] + b[:-1]), claims=[CLAIM["on-policy-norm-score"]])
    assert row.evidence[0].paired.pairs == 6
    assert row.evidence[0].paired.difference.value == pytest.approx(-0.05, abs=0.02)
    for row, seed in zip(b, np.random.default_rng(2).permutation(8)):
        row["seed"] = int(seed)
    assert judged(a + b, "on-policy-norm-score") == [UNSEEN]


@pytest.mark.fast
def test_each_setting_is_a_row_and_settings_do_not_mix():
    rows = [
        *cell("a8", final=0.8, rollout_format="int8"),
        *cell("a4", final=0.8, rollout_format="int4"),
        *cell("b8", final=0.6, rollout_format="int8", **NORM),
        *cell("b4", final=0.8, rollout_format="int4", **NORM),
        *cell("b2", final=0.1, rollout_format="int2", **NORM),
    ]
    found = evaluate(cells_of(rows), claims=[CLAIM["on-policy-norm-score"]])
    assert [(r.setting, r.evidence[0].names, r.verdict) for r in found] == [
        ("rollout_format int8", ("b8", "a8"), REPRODUCED),
        ("rollout_format int4", ("b4", "a4"), UNSEEN),
    ]
    for row in rows:
        if row["cell"] == "a8":
            row["settings"] = {**row["settings"], "learning_rate": 1e-3}
    found = evaluate(cells_of(rows), claims=[CLAIM["on-policy-norm-score"]])
    assert [r.evidence[0].names for r in found] == [("b4", "a4")]
    (row,) = evaluate(cells_of(rows[:8] + rows[16:24]), claims=[CLAIM["on-policy-norm-score"]])
    assert row.note == "no two cells that differ in this alone"


@pytest.mark.fast
def test_batches_follow_the_number_of_mini_batches():
    one = {"mini_batches": 1, "prompts": 64, "rollout_format": "int8"}
    starts = [
        *cell("on", 2, **one, cold_start="a"),
        *cell("off", 2, mini_batches=2, cold_start="b"),
    ]
    assert "cold_start" not in following(cells_of(starts))
    two = {"mini_batches": 2, "prompts": 128, "rollout_format": "int4", "replay": "R2"}
    cells = cells_of([*cell("on", 2, **one), *cell("off", 2, **two)])
    assert following(cells) == {"prompts"}
    claim = dataclasses.replace(
        CLAIM["similar-peaks"], comparisons=(({**two, "rollout_format": "int8"}, {}),)
    )
    assert not list(settings(claim, cells)), "the format never follows"
    cells = cells_of([*cell("on", 2, **one), *cell("off", 2, **{**two, "rollout_format": "int8"})])
    claim = dataclasses.replace(claim, comparisons=(({"mini_batches": 2, "replay": "R2"}, {}),))
    ((_, ((off, on),)),) = settings(claim, cells)
    assert (off.name, on.name) == ("off", "on")


@pytest.mark.fast
def test_a_clip_that_never_acts_is_no_setting():
    cells = cells_of([*cell("a", 2, clip=False), *cell("b", 2, policies="recomputed")])
    (row,) = evaluate(cells, claims=[CLAIM["on-policy-no-is-collapse"]])
    assert row.evidence[0].names == ("b", "a")
    off = cells_of(cell("a", 2, clip=False, mini_batches=2, replay="R2"))
    assert not verdicts.matches(off[0], {"mini_batches": 2, "replay": "R2"}, CLAIM["n2-clip-peak"])


@pytest.mark.fast
def test_three_cold_starts_are_compared_pairwise():
    at = {"mini_batches": 2, "replay": "R2", "noise": 0.005}
    rows = [r for name in "xyz" for r in cell(name, final=0.7, cold_start=name, **at)]
    (row,) = evaluate(cells_of(rows), claims=[CLAIM["cold-starts"]])
    assert [e.names for e in row.evidence] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert row.verdict == REPRODUCED
    rows += cell("w", final=0.1, cold_start="w", mini_batches=1)
    assert judged(rows, "cold-starts") == [REPRODUCED], "one that was not run with N = 2 and R2"
    rows = rows[:16] + cell("z", final=0.9, cold_start="z", **at)
    assert judged(rows, "cold-starts") == [CONTRADICTED]
    assert judged(rows[:16], "cold-starts") == [NOT_RUN]


def main_effect(clipped, unclipped):
    """N = 2, 4 and 8 with every replay: nine pairs of cells."""
    for n, replay in itertools.product((2, 4, 8), ("none", "R2", "R3")):
        at = dict(mini_batches=n, replay=replay, noise=0.0)
        yield from cell(f"{n} {replay}", collapse_at=list(next(clipped)), **at)
        yield from cell(
            f"{n} {replay} no clip", collapse_at=list(next(unclipped)), clip=False, **at
        )


@pytest.mark.fast
def test_cells_taken_together_show_what_no_pair_of_them_does():
    """In each of nine pairs, two of eight runs collapse without a clip, at varying seeds."""
    rng = np.random.default_rng(0)
    seeds = (rng.permutation(8)[:2] for _ in range(9))
    early = ([100 if i in chosen else None for i in range(8)] for chosen in seeds)
    rows = list(main_effect(iter([[None] * 8] * 9), early))
    assert judged(rows, *(f"n{n}-clip-survival" for n in (2, 4, 8))) == [UNSEEN] * 3
    (row,) = evaluate(cells_of(rows), claims=[CLAIM["off-policy-clip"]])
    (entry,) = row.evidence
    assert row.verdict == REPRODUCED
    assert entry.names == ("2 none no clip and 8 more", "2 none and 8 more")
    assert [states.count("collapsed") for states in entry.states] == [18, 0]
    assert [len(states) for states in entry.states] == [72, 72]
    # 18 of 72 runs collapse after about a quarter: they lose some seven tenths of the run.
    assert entry.paired.difference.value == pytest.approx(-0.25 * 0.7, abs=0.03)
    assert entry.paired.pairs == 8
    assert judged(rows, "off-policy-r3") == [UNSEEN], "replay changes nothing here"

    some = [row for row in rows if (row["cell"], row["seed"]) != ("4 R2", 3)]
    (row,) = evaluate(cells_of(some), claims=[CLAIM["off-policy-clip"]])
    assert row.evidence[0].paired.pairs == 7, "a seed that one cell lacks is left out of all"
    some = [row for row in rows if row["cell"] != "4 R2"]
    assert judged(some, "off-policy-clip") == [NOT_RUN]


@pytest.mark.fast
def test_survival_is_compared_up_to_the_shorter_record():
    """A collapse at step 300 of 400 is no difference from a run that ended at step 200."""
    n2 = {"mini_batches": 2, "replay": "R2"}
    late = cell("late", 6, collapse_at=300, clip=False, **n2)
    for steps, expected in ((200, 0.0), (400, -0.24)):
        (row,) = evaluate(
            cells_of([*late, *cell("ref", 6, steps=steps, **n2)]),
            claims=[CLAIM["n2-clip-survival"]],
        )
        assert row.evidence[0].paired.difference.value == pytest.approx(expected, abs=0.06)


def test_markdown_says_what_was_found(tmp_path):
    """There is a line per claim and setting, with its own cells, figures and verdict."""
    rows = evaluate(cells_of(study()))
    _, _, *lines = claim_lines(rows)
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines):
        sentence, _, shown, verdict = line.strip("| ").split(" | ")
        assert sentence.startswith(row.claim.sentence)
        assert verdict.replace("*", "").split(":")[0] == row.verdict
        for entry in row.evidence:
            assert all(f"`{name}`" in shown for name in entry.names)
            if entry.paired and row.claim.outcome == "final":
                assert f"{abs(entry.paired.difference.value):.3f}" in shown
                assert f"{entry.paired.pairs} seeds" in shown
    write_claims(tmp_path, study(), Collapse())
    text = (tmp_path / "claims.md").read_text()
    assert f"{sum(row.verdict == REPRODUCED for row in rows)} reproduced" in text
    assert all(line in text for line in lines)
