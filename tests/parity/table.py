"""Measures how far this package differs from transformers, and prints a table in Markdown.

Run `python -m tests.parity.table [ARCHITECTURE ...]`, with the extra "parity" installed.

Results with transformers 5.23 (eager attention and experts) on small random models, float32 on a
CPU, jax 0.10.2. They vary between machines, and in the last digit between runs. Differences are
relative to the largest entry of transformers' result, except log-probabilities (nats) and counts.

    architecture           layers  hidden  logits  log-probs  experts  gates  packed
    qwen3                  5e-07   5e-07   7e-07   3e-06      0        0      6e-07
    qwen3-yarn             1e-06   1e-06   1e-06   3e-06      0        0      7e-07
    qwen3-moe              1e-06   1e-06   1e-06   5e-06      0        2e-06  9e-07
    qwen3-moe-alternating  1e-06   1e-06   1e-06   3e-06      0        1e-06  1e-06
    olmoe                  7e-07   8e-07   1e-06   2e-06      0        5e-07  8e-07
    mixtral                1e-06   1e-06   1e-06   4e-06      0        8e-07  1e-06
    deepseek-v3            1e-06   2e-06   2e-06   3e-06      0        7e-07  1e-06
    moonlight              1e-06   2e-06   2e-06   5e-06      0        5e-07  1e-06
    deepseek-v3-variant    2e-06   8e-07   9e-07   2e-06      0        5e-07  3e-06

    architecture           gradients  greedy  cached  loaded  tensors  exported  bfloat16
    qwen3                  3e-06      0       3e-06   0       0        0         0.82
    qwen3-yarn             2e-06      0       3e-06   0       0        0         0.83
    qwen3-moe              8e-06      0       3e-06   0       0        0         0.73
    qwen3-moe-alternating  2e-06      0       2e-06   0       0        0         0.95
    olmoe                  2e-06      0       2e-06   0       0        0         0.87
    mixtral                4e-06      0       1e-05   0       0        0         0.82
    deepseek-v3            4e-06      0       1e-05   0       0        0         0.94
    moonlight              1e-05      0       6e-06   0       0        0         0.79
    deepseek-v3-variant    4e-06      0       2e-05   0       0        0         0.91

Columns (`measure.CHECKS` has their tolerances):

  layers      outputs of all blocks, for a left-padded batch
  hidden      hidden states after the last norm
  logits      logits
  log-probs   log-probabilities of the next tokens
  experts     number of (token, layer) pairs whose chosen experts differ
  gates       weights of the chosen experts
  packed      hidden states and log-probabilities of rows with several sequences, against each
              sequence alone
  gradients   gradient of Σ w · log π with random w, in the tensor with the largest difference
  greedy      number of tokens that differ from `generate`, of 3 × 32 sampled through the key/value
              cache
  cached      "cached log-probs": log-probabilities of these tokens as sampled (latent attention in
              its absorbed form), against one full pass of transformers
  loaded      number of parameters that differ between the two layouts of one model
  tensors     number of tensors, over all exports, that are not bit-identical to the original
  exported    logits of transformers on exports, against its logits on the original
  bfloat16    mean error of log-probabilities in bfloat16, divided by that of transformers in
              bfloat16

deepseek-v3-variant has options that neither DeepSeek-V3 nor Moonlight uses: rotation by halves, and
gates that are not normalised.

The short table of `jaxrl_stable/hf/README.md` is taken from these figures; its column "forward" is
the largest of layers, hidden, logits, gates and packed.
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
