"""Losses, gradients and advantages are those of TRL.

`make_trl_fixtures.py` made the file. The live comparison is in `tests/parity`.
"""

import functools
import itertools
import json
import pathlib

import numpy as np
import pytest

from jaxrl_stable.rewards.overlong import overlong_penalty
from tests.objectives import trl_cases, trl_ours

# Everything in float64; in float32 only cases that are not variants of others.
PRECISIONS = [(name, "float64") for name in trl_cases.LOSSES] + [
    pytest.param(name, "float32", marks=pytest.mark.fast)
    for name in trl_cases.LOSSES
    if "," not in name
]
# Different names for one thing; all other settings must make a difference.
SAME = [{"dapo", "asynchronous"}, {"gspo", "gspo, form of tokens"}]


@functools.cache
def frozen():
    file = pathlib.Path(__file__).parent / "frozen" / "trl.npz"
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@functools.cache
def batches():
    fields = [frozen()[f"batch/{name}"] for name in trl_cases.Batch._fields]
    return [trl_cases.Batch(*arrays) for arrays in zip(*fields)]


@pytest.mark.parametrize("name, dtype", PRECISIONS)
def test_loss(name, dtype):
    case = trl_cases.LOSSES[name]
    actual = trl_ours.our_losses(case, batches(), dtype)
    assert actual["gradient"].dtype == dtype
    expected = {key: frozen()[f"loss/{name}/{key}"] for key in actual}
    errors = trl_ours.differences(case, actual, expected)
    assert all(error <= trl_ours.tolerance(key, dtype) for key, error in errors.items()), errors


@pytest.mark.parametrize("name", trl_cases.ADVANTAGES)
def test_advantages(name):
    case, expected = trl_cases.ADVANTAGES[name], frozen()[f"advantage/{name}"]
    error = trl_ours.relative(trl_ours.our_advantages(case, batches()), expected)
    assert error <= trl_cases.TOLERANCES["float64"]


@pytest.mark.fast
@pytest.mark.parametrize("limit, buffer", trl_cases.OVERLONG)
def test_overlong_penalty(limit, buffer):
    np.testing.assert_allclose(
        overlong_penalty(trl_cases.LENGTHS, limit, buffer),
        frozen()[f"overlong/{limit}/{buffer}"],
        atol=1e-7,
    )


@pytest.mark.fast
def test_file_has_the_cases_of_the_table():
    about = json.loads(str(frozen()["about"]))
    for kind, table in (("loss", trl_cases.LOSSES), ("advantage", trl_cases.ADVANTAGES)):
        assert about[kind] == {name: trl_ours.settings(case) for name, case in table.items()}


@pytest.mark.fast
def test_every_setting_is_at_work():
    gradients = {name: frozen()[f"loss/{name}/gradient"] for name in trl_cases.LOSSES}
    for a, b in itertools.combinations(gradients, 2):
        alike = trl_ours.relative(gradients[a], gradients[b]) < 1e-3
        assert alike == ({a, b} in SAME), (a, b)


@pytest.mark.fast
def test_clips_are_active():
    """Both sides clip some tokens; a batch without clipped tokens would prove little."""
    for name, case in trl_cases.LOSSES.items():
        for key in (f"loss/{name}/{metric}" for metric in trl_cases.METRICS if "clip" in metric):
            if key in frozen():
                assert (frozen()[key].mean() > 0.01) == case.off_policy, key
