"""Makes `frozen/trl.npz`: what TRL computes for every case of `trl_cases`, on a few batches.

Needs the extra "parity", best in an environment of its own:

    pip install -e '.[test,parity]' && python -m tests.objectives.make_trl_fixtures
"""

import importlib.metadata
import json
import pathlib

import numpy as np

from tests.objectives import trl_cases, trl_ours, trl_theirs

FROZEN = pathlib.Path(__file__).parent / "frozen" / "trl.npz"
SEEDS = range(4)


def about() -> dict:
    cases = {"loss": trl_cases.LOSSES, "advantage": trl_cases.ADVANTAGES}
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch")},
        **{
            kind: {name: trl_ours.settings(case) for name, case in table.items()}
            for kind, table in cases.items()
        },
    }


def computed() -> dict[str, np.ndarray]:
    batches = [trl_cases.draw(seed) for seed in SEEDS]
    arrays = {f"batch/{key}": x for key, x in trl_ours.stack(b._asdict() for b in batches).items()}
    for name, case in trl_cases.LOSSES.items():
        for key, values in trl_theirs.their_losses(case, batches).items():
            arrays[f"loss/{name}/{key}"] = values
    for name, case in trl_cases.ADVANTAGES.items():
        arrays[f"advantage/{name}"] = trl_theirs.their_advantages(case, batches)
    for limit, buffer in trl_cases.OVERLONG:
        arrays[f"overlong/{limit}/{buffer}"] = trl_theirs.their_penalties(limit, buffer)
    return arrays


if __name__ == "__main__":
    FROZEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(FROZEN, about=json.dumps(about()), **computed())
