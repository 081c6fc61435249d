"""One program for one device and for meshes of eight virtual ones."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Sizes of data, fsdp, expert, tensor, context.
ALL = [
    {"mesh": [8, 1, 1, 1, 1]},
    {"mesh": [2, 2, 2, 1, 1], "replay": "R2"},
    {"mesh": [1, 2, 2, 2, 1], "replay": "R2"},
    {"mesh": [1, 1, 8, 1, 1], "replay": "R2"},
    {"mesh": [1, 1, 8, 1, 1], "experts_exchange": "ragged_all_to_all"},
    {"mesh": [1, 2, 2, 2, 1], "experts_exchange": "ragged_all_to_all", "experts": "ragged"},
    {"mesh": [1, 2, 2, 1, 2], "replay": "R2", "format": "none"},
    {"mesh": [1, 1, 2, 1, 4], "remat": "dots", "sft": True},
    {"mesh": [1, 2, 2, 2, 1], "replay": "R2", "format": "int8_w8a8"},
]
FEW = [
    {"mesh": [1, 2, 2, 2, 1], "experts_exchange": "ragged_all_to_all"},
    {"mesh": [2, 1, 2, 1, 2], "remat": "block", "lot": 16, "experts_rows": 25},
]


def run_script(name: str, *arguments: str) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"tests.sharding.{name}", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run(cases: list[dict]) -> str:
    return run_script("agreement", json.dumps(cases))


def test_meshes_agree_with_one_device():
    """Tokens, routing, log-probs, metrics and gradients are the same on 1 and 8 devices."""
    assert run(FEW).count("largest difference") == len(FEW)


@pytest.mark.slow
def test_every_kind_of_mesh_agrees_with_one_device():
    """Tests every axis alone and together, R2 and R3, and both ways to reach the experts."""
    assert run(ALL).count("largest difference") == len(ALL)


def test_the_kernel_agrees_with_plain_attention():
    """Tests interpreted splash: segments, padding, zig-zag columns, heads over other devices."""
    assert run_script("splash_agreement").count("agrees") == 3
