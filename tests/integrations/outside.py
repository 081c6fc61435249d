"""Shared by the tests of the examples: where the examples are, and what their losses must be."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "experiments" / "integrations"
sys.path.append(str(EXAMPLES))  # the scripts find each other; the tests find them

OPTIONAL = {
    "equinox_module": ("equinox", "pip install equinox"),
    "tunix_minirl": ("tunix", "pip install -e '.[test,tunix]', in an environment of its own"),
}


def example(name):
    """Returns an example as a module; skips the test if its framework is not installed."""
    if name in OPTIONAL:
        package, command = OPTIONAL[name]
        pytest.importorskip(package, reason=f"{name} needs {package}: {command}")
    return importlib.import_module(name)


def minirl_loss(logp, logp_old, logp_rollout, advantages, mask, low=0.2, high=0.27, cap=5.0):
    """Computes MiniRL by the formula, in NumPy and float64 (arXiv:2512.01374, eq. 7).

    −(1/n) Σ_i Σ_t M_t min(π_θ/μ_old, C) Â log π_θ over n responses that have tokens.
    """
    total = 0.0
    for b, t in np.argwhere(mask):
        a = float(advantages[b])
        ratio = np.exp(float(logp[b, t]) - float(logp_old[b, t]))
        if (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low):
            continue
        weight = min(np.exp(float(logp[b, t]) - float(logp_rollout[b, t])), cap)
        total -= weight * a * float(logp[b, t])
    return total / max(np.asarray(mask).any(1).sum(), 1)
