"""Losses, gradients, corrections and metrics are those of verl, slime and BAPO.

`make_upstream_fixtures.py` made the file.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxrl_stable import corrections
from jaxrl_stable.diagnostics.mismatch import mismatch_metrics
from jaxrl_stable.diagnostics.parts import finalize
from jaxrl_stable.diagnostics.weights import (
    clip_metrics,
    correction_metrics,
    used_weights,
    weight_metrics,
)
from jaxrl_stable.objectives import aggregate, divide, minirl
from tests.objectives import upstream_cases as cases

FLOAT64, FLOAT32 = dict(rtol=1e-9, atol=1e-12), dict(rtol=1e-6, atol=1e-7)
SEEDS = len(cases.SEEDS)


@functools.cache
def frozen():
    file = pathlib.Path(__file__).parent / "frozen" / "upstream.npz"
    with np.load(file, allow_pickle=False) as arrays:
        arrays = dict(arrays)
    return arrays | dict(zip(arrays["names"].tolist(), arrays["numbers"]))


def on_batches(function):
    """Returns the results of every batch, in float64; metrics are float32."""
    with jax.enable_x64(True):
        batch = cases.Batch(*(frozen()[f"batch/{name}"] for name in cases.Batch._fields))
        return jax.tree.map(np.asarray, jax.vmap(function)(batch))


def relative(actual, expected):
    """Returns the largest difference in each batch, relative to the largest entry."""
    axes = tuple(range(1, actual.ndim))
    assert actual.shape == expected.shape and actual.dtype == np.float64
    return np.abs(actual - expected).max(axes) / np.abs(expected).max(axes)


def our_loss(case, batch):
    old = batch.rollout if case.bypass else batch.old

    def loss_and_out(logp):
        arrays = logp, old, batch.rollout, batch.advantages, batch.mask
        out = loss = case.ours(*arrays, **case.options)
        if case.corrections:
            correction, options = case.corrections
            loss = corrections.correct(out, correction(*arrays, **options))
        return divide(*aggregate(loss.loss, batch.mask, case.aggregation, case.horizon)), out

    (loss, out), gradient = jax.value_and_grad(loss_and_out, has_aux=True)(batch.logp)
    metrics = finalize(clip_metrics(out, batch.mask) | used_weights(out, batch.mask))
    return loss, gradient, metrics


@pytest.mark.parametrize("name", cases.LOSSES)
def test_loss(name):
    case = cases.LOSSES[name]
    loss, gradient, metrics = on_batches(functools.partial(our_loss, case))
    theirs = {key: frozen()[f"loss/{name}/{key}"] for key in ("loss", "gradient")}
    assert relative(gradient, theirs["gradient"]).max() <= 1e-9
    np.testing.assert_allclose(loss, theirs["loss"], **FLOAT64)
    for ours, names in case.shares.items():
        shares = sum(frozen()[f"loss/{name}/{share}"] for share in names)
        np.testing.assert_allclose(metrics[ours], shares, **FLOAT32)


@pytest.mark.parametrize("name", cases.CORRECTIONS)
def test_correction(name):
    case = cases.CORRECTIONS[name]

    def ours(batch):
        arrays = batch.logp, batch.old, batch.rollout
        factor = case.ours(*arrays, batch.advantages, batch.mask, **case.options)
        return factor, finalize(correction_metrics(factor, *arrays[1:], batch.mask))

    factor, metrics = on_batches(ours)
    theirs = frozen()[f"correction/{name}/factor"]
    np.testing.assert_allclose(factor, theirs, rtol=1e-9)
    for ours_of, key in case.metrics.items():
        expected = frozen()[f"correction/{name}/{key}"]
        np.testing.assert_allclose(metrics[ours_of], expected, **FLOAT32)


def assert_metrics(actual, prefix, names):
    """Maps their names to ours."""
    tokens = frozen()["batch/mask"].sum((1, 2))
    counts = {"tokens": tokens, "rows": np.full(SEEDS, cases.ROWS)}
    for theirs, ours in names.items():
        expected = frozen()[f"metric/{prefix}/{theirs}"]
        if theirs in cases.OVER_LESS_ONE:
            n = counts[cases.OVER_LESS_ONE[theirs]]
            expected = expected * np.sqrt((n - 1) / n)
        np.testing.assert_allclose(actual[ours], expected, err_msg=theirs, **FLOAT32)


@pytest.mark.parametrize("system", cases.METRICS)
def test_mismatch_metrics(system):
    actual = on_batches(lambda x: finalize(mismatch_metrics(x.old, x.rollout, x.mask)))
    assert_metrics(actual, system, cases.METRICS[system])


@pytest.mark.parametrize("threshold", cases.WEIGHTS)
def test_weight_metrics(threshold):
    def ours(x):
        arrays = x.logp, x.old, x.rollout, x.advantages, x.mask
        out = minirl(*arrays, clip=False, weight="mismatch", truncation=threshold)
        return finalize(weight_metrics(out, x.mask))

    assert_metrics(on_batches(ours), f"verl/{threshold:g}", cases.WEIGHTS[threshold])


@pytest.mark.fast
def test_equal_names_are_not_equal_things():
    verl, slime = cases.METRICS["verl"], cases.METRICS["slime"]
    different = {name for name in verl.keys() & slime.keys() if verl[name] != slime[name]}
    assert different == {"kl", "k3_kl", "chi2_token"}
    for name in verl.keys() & slime.keys():
        a, b = (frozen()[f"metric/{system}/{name}"] for system in ("verl", "slime"))
        assert np.all(np.isclose(a, b, rtol=1e-3) == (name not in different)), name


@pytest.mark.fast
def test_file_has_the_cases_of_the_table():
    about = json.loads(str(frozen()["about"]))
    assert about["settings"] == json.loads(json.dumps(cases.settings()))
    files = [file for of in about["sources"].values() for file in of.values()]
    assert files and all(len(file["commit"]) == 40 and file["functions"] for file in files)


@pytest.mark.fast
def test_clips_are_active():
    """Some tokens are clipped, truncated or dropped, and some are not, in every case."""
    advantages, mask = frozen()["batch/advantages"][..., None], frozen()["batch/mask"]
    silencing = cases.dppo, cases.ppo, cases.gspo, cases.gmpo, cases.bapo
    for name, case in cases.LOSSES.items():
        zero = (frozen()[f"loss/{name}/gradient"] == 0) & mask
        clipped = [(zero & side).sum() / mask.sum() for side in (advantages > 0, advantages < 0)]
        assert (case.ours in silencing) == (min(clipped) > 0.005), (name, clipped)
        assert max(clipped) < 0.5, name
        for names in case.shares.values():
            share = sum(frozen()[f"loss/{name}/{key}"] for key in names)
            # NO_BOUND truncates nothing.
            bounded = len(names) == 2 or case.settings.get("clip_ratio_c") != cases.NO_BOUND
            assert ("lower" in names[-1] and not bounded) == (share.mean() < 0.02), name
    for name in cases.CORRECTIONS:
        factor = frozen()[f"correction/{name}/factor"]
        drops = (factor[mask] == 0).any()
        bound = factor == (0 if drops else factor.max((1, 2), keepdims=True))
        assert 0.02 < bound[mask].mean() < 0.7, name
    for name in cases.SHARES:
        assert frozen()[f"metric/verl/2/{name}"].max() > 0, name


@pytest.mark.fast
def test_bounds_of_bapo_are_searched():
    """In one batch each target is reached midway; in the others at the start, or never."""
    for target in (".9", "1.24", "1.55"):
        high = frozen()[f"loss/bapo, target {target}/clip_high"]
        assert np.sum((high > 1.2) & (high < 2)) == 1, target
