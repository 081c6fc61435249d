"""Losses, gradients and advantages agree with TRL, which computes them live.

Needs torch and trl (the extra "parity"); `tests/objectives/test_trl_frozen.py` needs neither.
"""

import importlib.metadata
import inspect
import json
import re

import numpy as np
import pytest

HINT = "needs torch and trl: pip install -e '.[test,parity]'"
pytest.importorskip("torch", reason=HINT)
pytest.importorskip("trl", reason=HINT)

import trl  # noqa: E402

from jaxrl_stable.rewards.overlong import overlong_penalty  # noqa: E402
from tests.objectives import make_trl_fixtures, trl_cases, trl_ours, trl_theirs  # noqa: E402

BATCHES = [trl_cases.draw(seed) for seed in range(100, 110)]  # none of them is in the frozen file


@pytest.mark.parametrize("name", trl_cases.LOSSES)
def test_loss(name):
    case = trl_cases.LOSSES[name]
    actual = trl_ours.our_losses(case, BATCHES)
    expected = trl_theirs.their_losses(case, BATCHES)
    errors = trl_ours.differences(case, actual, expected)
    assert all(error <= trl_ours.tolerance(key, "float64") for key, error in errors.items()), errors


@pytest.mark.parametrize("name", trl_cases.ADVANTAGES)
def test_advantages(name):
    case = trl_cases.ADVANTAGES[name]
    expected = trl_theirs.their_advantages(case, BATCHES)
    error = trl_ours.relative(trl_ours.our_advantages(case, BATCHES), expected)
    assert error <= trl_cases.TOLERANCES["float64"]


@pytest.mark.parametrize("limit, buffer", trl_cases.OVERLONG)
def test_overlong_penalty(limit, buffer):
    actual = overlong_penalty(trl_cases.LENGTHS, limit, buffer)
    expected = trl_theirs.their_penalties(limit, buffer)
    np.testing.assert_allclose(actual, expected, atol=1e-7)


def test_file_is_what_this_version_computes():
    with np.load(make_trl_fixtures.FROZEN, allow_pickle=False) as file:
        frozen = dict(file)
    made_with = json.loads(str(frozen.pop("about")))["versions"]["trl"]
    if made_with != importlib.metadata.version("trl"):
        pytest.skip(f"the file was made with trl {made_with}")
    computed = make_trl_fixtures.computed()
    assert computed.keys() == frozen.keys()
    for key, values in computed.items():
        np.testing.assert_allclose(frozen[key], values, rtol=1e-6, atol=1e-12, err_msg=key)


def test_every_loss_type_is_compared():
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    branches = " ".join(re.findall(r"self\.loss_type (?:==|in) (.*):", source))
    compared = {case.trl.get("loss_type", "dapo") for case in trl_cases.LOSSES.values()}
    assert compared == set(re.findall(r"\w+", branches))
