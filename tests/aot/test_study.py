"""A study on a slice of a pod: all chips make their own runs at once, without communication."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxrl_stable import gin_files
from jaxrl_stable.aot.collectives import collectives
from jaxrl_stable.aot.hlo import parse
from jaxrl_stable.model.attention import attention_implementation
from jaxrl_stable.study.__main__ import build
from jaxrl_stable.study.programs import compiled, over_runs

TINY = pathlib.Path(__file__).parents[1] / "study" / "tiny.gin"
CHIPS, RUNS = 8, 16


def test_a_study_compiles_for_a_slice_and_sends_nothing(slice_of):
    study = gin_files.load([str(TINY)], [], build)
    attention = attention_implementation(study.model, "tpu")  # not this machine's
    study = dataclasses.replace(study, model=dataclasses.replace(study.model, attention=attention))
    devices = list(slice_of("v5e:2x4", (CHIPS,), ("runs",)).devices.flat)
    step, _ = compiled(study, list(study.cells().values()), RUNS, devices)
    assert collectives(parse(step.as_text()), CHIPS) == []
    runs, _ = step.input_shardings[0]
    assert {leaf.spec for leaf in jax.tree.leaves(runs)} == {P("runs")}


def test_a_chip_makes_its_runs_at_once(slice_of):
    mesh = slice_of("v5e:2x4", (CHIPS,), ("runs",))
    mapped = over_runs(lambda x, shared: x @ x + shared, list(mesh.devices.flat))
    jaxpr = str(jax.make_jaxpr(mapped)(jnp.ones((RUNS, 3, 3)), 1.0))
    assert "scan" not in jaxpr and f"f32[{RUNS // CHIPS},3,3] = dot_general" in jaxpr
