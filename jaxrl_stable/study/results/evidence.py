"""The effect of replay on the mismatch in the first two rollouts, and the bytes that it needs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxrl_stable.files import read_json, write_atomic
from jaxrl_stable.routing import expert_dtype
from jaxrl_stable.study.config import PAPER, Study
from jaxrl_stable.study.results.analysis import Record, cells_of
from jaxrl_stable.study.results.verdicts import canonical

FREE = ("mini_batches", "replay")  # all other settings are the paper's


def replay_rows(records: Iterable[Record], study: Study) -> list[dict[str, Any]]:
    """Returns one row per N, replay and sampler of MiniRL, with means over seeds.

    `kl_step0` and `kl_step1` are the k3 KL (nats per token) between sampler and trainer in the
    first rollout and in the second, N updates later. `bytes_per_token` is L · K · bytes per expert
    id: the size of the routing in a rollout, whether or not it is replayed.
    """
    config = study.model
    width = expert_dtype(config.num_experts).itemsize
    carried = config.num_moe_layers * config.num_experts_per_token * width
    rows = []
    for cell in cells_of(records):
        full = canonical(cell.settings)
        if any(full[key] != value for key, value in PAPER.items() if key not in FREE):
            continue
        kl, agreement = (
            np.array([run["first"][name] for run in cell.runs], float)
            for name in ("kl", "routing_agreement")
        )
        sampler = full["rollout_format"]
        rows.append(
            {
                "setting": cell.name if sampler in cell.name else f"{cell.name}, {sampler}",
                "kl_step0": float(kl[:, 0].mean()),
                "kl_step1": float(kl[:, 1].mean()) if kl.shape[1] > 1 else None,
                "routing_agreement": float(agreement[:, 0].mean()),
                "bytes_per_token": carried,
            }
        )
    return rows


def write_evidence(directory: pathlib.Path, records: Iterable[Record], study: Study) -> None:
    """Writes the rows to evidence.json; keeps its other entries (the measured cost of replay)."""
    path = directory / "evidence.json"
    found = read_json(path) | {"rows": replay_rows(records, study)}
    write_atomic(path, json.dumps(found, indent=1) + "\n")
