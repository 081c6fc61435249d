"""Makes `frozen/`: checkpoints that transformers writes, and the results that it computes.

Run it once with each major version of transformers; each rewrites only its own directories:

    pip install 'transformers>=5' torch && python -m tests.hf.make_fixtures
    pip install 'transformers<5'  torch && python -m tests.hf.make_fixtures
"""

import itertools
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import numpy as np
import torch

from tests.hf import batches, theirs, zoo

FROZEN = pathlib.Path(__file__).parent / "frozen"
CLEAR = 1e-3  # lead of a greedy token in logits, far above differences between programs
PROBES = 6  # entries of each gradient that are kept, besides its norm


class Fixture(NamedTuple):
    """A model of the zoo, and how it is stored."""

    dtype: str = "bfloat16"
    fused: bool = False
    shard_bytes: int = 10**9
    gradients: bool = False


# One per layout, type and config spelling; small, because they are in the repository.
FIXTURES = {
    4: {
        "qwen3": Fixture(),
        "qwen3-moe": Fixture(),
        "olmoe": Fixture("float16"),
        "mixtral": Fixture(shard_bytes=20_000),
        "deepseek-v3": Fixture("float32", gradients=True),
    },
    5: {
        "qwen3": Fixture(),
        "qwen3-moe": Fixture("float32", shard_bytes=40_000, gradients=True),
        "olmoe": Fixture(),
        "mixtral": Fixture(fused=True),
        "deepseek-v3": Fixture(fused=True, shard_bytes=20_000),
    },
}


def make(name: str, fixture: Fixture, seed: int) -> bool:
    """Writes one directory, checkpoint and `expected.npz`; False if a greedy token is unclear."""
    directory = FROZEN / f"{name}.v{zoo.VERSION}"
    shutil.rmtree(directory, ignore_errors=True)
    drawn = zoo.build(name, seed)
    with tempfile.TemporaryDirectory() as scratch:
        drawn.save_pretrained(scratch)
        half = zoo.again(drawn, scratch, dtype=getattr(torch, fixture.dtype))
    options = {"save_original_format": not fixture.fused} if zoo.VERSION >= 5 else {}
    half.save_pretrained(directory, max_shard_size=fixture.shard_bytes, **options)
    (directory / "generation_config.json").unlink(missing_ok=True)
    model = zoo.again(drawn, directory, dtype=torch.float32)
    batch = tokens, positions, segments = batches.left_padded()
    seen = theirs.observe(model, *batch)
    response, lead = theirs.greedy(model, tokens, segments)
    if lead < CLEAR:
        return False
    seen |= dict(tokens=tokens, positions=positions, segments=segments, response=response)
    if fixture.gradients:
        seen |= probes(theirs.gradients(model, *batch))
    del seen["layers"], seen["experts"]  # experts are the nonzero gates
    np.savez_compressed(directory / "expected.npz", **seen)
    return True


def probes(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns each gradient's name, norm and some entries."""
    rng = np.random.default_rng(0)
    places = [rng.integers(0, gradient.size, PROBES) for gradient in gradients.values()]
    return dict(
        gradient_names=np.array(list(gradients)),
        gradient_norms=np.array([np.linalg.norm(g.ravel()) for g in gradients.values()]),
        gradient_places=np.array(places),
        gradient_entries=np.array(
            [gradient.ravel()[place] for gradient, place in zip(gradients.values(), places)]
        ),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, fixture in FIXTURES[zoo.VERSION].items():
        print(name, next(seed for seed in itertools.count() if make(name, fixture, seed)))
