"""Synthetic records of a study, with curves of a plausible shape."""

import numpy as np


def record(
    cell,
    seed=0,
    *,
    final=0.8,
    start=0.1,
    collapse_at=None,
    kl=0.01,
    steps=400,
    every=8,
    noise=0.02,
    figure=("one",),
    seconds=12.5,
    **settings,
):
    """Returns a run that learns from `start` to `final` and falls to 0 from `collapse_at` on."""
    rng = np.random.default_rng((seed, *map(ord, cell)))
    x = np.arange(0, steps + 1, every)
    level = start + (final - start) * (1 - np.exp(-4 * x / steps))
    entropy = 1.5 - 0.6 * x / steps
    mismatch = kl * np.exp(0.5 * x / steps + rng.normal(0, 0.2, len(x)))
    if collapse_at is not None:
        after = np.maximum(0.0, x - collapse_at)
        level = level * np.exp(-after / 15)
        entropy = entropy * np.exp(-after / 40)
        mismatch = mismatch * np.exp(after / 60)
    sparse = slice(None, None, 5)
    return {
        "cell": cell,
        "figure": list(figure),
        "seed": seed,
        "settings": settings,
        "curves": {
            "gradient_steps": x.tolist(),
            "reward": (level + rng.normal(0, noise, len(x))).tolist(),
            "kl": mismatch.tolist(),
            "entropy": (entropy + rng.normal(0, 0.02, len(x))).tolist(),
        },
        "evaluations": {
            "gradient_steps": x[sparse].tolist(),
            "score": np.clip(level[sparse] + rng.normal(0, noise, len(x[sparse])), 0, 1).tolist(),
        },
        "seconds": seconds,
    }


def cell(name, seeds=8, **options):
    """Returns the runs of a cell; a list in an option has one entry per seed."""
    chosen = [
        {k: v[seed] if isinstance(v, list) else v for k, v in options.items()}
        for seed in range(seeds)
    ]
    return [record(name, seed, **options) for seed, options in enumerate(chosen)]


def study(seeds=8):
    """Returns records for figures 1 and 3 of the paper."""
    rng = np.random.default_rng(0)
    early, late = (rng.uniform(*ends, seeds).tolist() for ends in ((60, 160), (250, 390)))
    base = {"rollout_format": "int8", "task": "sum <b>", "learning_rate": 3e-4}
    norm = {"aggregation": "seq-mean-token-mean"}
    one = {**base, "mini_batches": 1, "figure": ("on_policy",)}
    four = {**base, "mini_batches": 4, "figure": ("off_policy_n4",)}
    r2, r3 = {"replay": "R2"}, {"replay": "R3", "kl": 0.003}
    rows = [
        *cell("MiniRL", seeds, final=0.85, **one),
        *cell("MiniRL, length norm", seeds, final=0.7, **one, **norm),
        *cell("MiniRL − IS", seeds, collapse_at=early, weight="none", **one),
        *cell("MiniRL + R3", seeds, final=0.84, **one, **r3),
        *cell("MiniRL + R3, length norm", seeds, final=0.62, **one, **r3, **norm),
        *cell("MiniRL + R3 − IS", seeds, collapse_at=early, weight="none", **one, **r3),
        *cell("N=4, no clip", seeds, collapse_at=early, clip=False, **four),
        *cell("N=4, R2, no clip", seeds, collapse_at=late, clip=False, **four, **r2),
        *cell("N=4, R2", seeds, final=0.8, **four, **r2),
        *cell("N=4, R3", seeds, final=0.86, **four, **r3),
        *cell("N=4, <clip> & no replay", seeds, final=0.8, **four),
        *cell("N=4, GSPO", seeds, final=0.75, loss="gspo", **four, **norm),
        *cell("N=4, DPPO", seeds, final=0.77, loss="dppo", **four),
        *cell("N=4, VESPO", seeds, final=0.1, start=0.1, loss="vespo", **four),
    ]
    return rows
