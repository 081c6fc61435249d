"""The measured differences as a table in Markdown, for `jaxrl_stable/hf/README.md`.

Run `python -m tests.parity.table [ARCHITECTURE ...]`, with the extra "parity" installed.
"""

import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import torch
import transformers

from tests.parity import measure


def cell(error: float) -> str:
    if error == int(error):
        return f"{error:.0f}"
    return f"{error:.2f}" if error > 0.01 else f"{error:.0e}"


def main(names: list[str]) -> None:
    for package in (transformers, torch, jax):
        print(package.__name__, package.__version__)
    print()
    print("|", " | ".join(["architecture", *measure.CHECKS]), "|")
    print("|---" * (1 + len(measure.CHECKS)) + "|")
    for name in names or measure.zoo.ZOO:
        with tempfile.TemporaryDirectory() as directory:
            errors = measure.measure(name, pathlib.Path(directory))
        print(
            "|",
            " | ".join([name, *(cell(errors[check]) for check in measure.CHECKS)]),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
