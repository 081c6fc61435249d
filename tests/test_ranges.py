"""Every field of every config refuses what makes no sense, whichever fields there are."""

import dataclasses
import math
import re
import typing

import pytest

from jaxrl_stable import configs
from jaxrl_stable.array_tasks import Countdown, ModularAddition, Parity, Reverse
from jaxrl_stable.data import ArithmeticSource
from jaxrl_stable.model import tiny
from jaxrl_stable.model.config import LatentSizes, Yarn
from jaxrl_stable.sampler.rollout import Sampling
from jaxrl_stable.sharding import MeshShape
from jaxrl_stable.study import config as study

pytestmark = [pytest.mark.fast, pytest.mark.refusal]

CONFIGS = (
    configs.Data(),
    configs.Optimizer(),
    configs.Supervised(),
    configs.Reinforcement(),
    configs.Evaluation(),
    configs.Experiment(),
    configs.Objective(),
    tiny(),
    Yarn(2.0, 64),
    LatentSizes(8, 4, 8),
    MeshShape(),
    Sampling(4),
    study.Study(task=Reverse(), model=tiny(), grids=(study.Grid(),)),
    study.ColdStart(),
    study.Collapse(),
    ArithmeticSource(4),
    ModularAddition(),
    Parity(),
    Reverse(),
    Countdown(),
)
# Numbers that may be negative: a bonus that is a penalty, an exponent's coefficient, an id.
SIGNED = {"entropy_coefficient", "softmax_mscale", "pad_id"}


def fields_of(*kinds):
    """Yields a config and the name of each field whose annotation has one of the types."""
    for config in CONFIGS:
        hints = typing.get_type_hints(type(config))
        for field in dataclasses.fields(config):
            parts = {hints[field.name], *typing.get_args(hints[field.name])}
            if parts & set(kinds):
                yield pytest.param(config, field.name, id=f"{type(config).__name__}.{field.name}")


def refused(config, name, value):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(config, **{name: value})
    assert re.search(rf"\b{name}\b", str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(("config", "name"), [*fields_of(int, float)])
def test_a_negative_number(config, name):
    if name in SIGNED:
        dataclasses.replace(config, **{name: -7})
    else:
        refused(config, name, -7)


@pytest.mark.parametrize(("config", "name"), [*fields_of(float)])
def test_a_float_that_is_not_finite(config, name):
    for value in (math.nan, math.inf):
        refused(config, name, value)


@pytest.mark.parametrize(("config", "name"), [*fields_of(int)])
def test_a_float_for_an_integer(config, name):
    if float not in typing.get_args(typing.get_type_hints(type(config))[name]):
        refused(config, name, 8.0)


@pytest.mark.parametrize(("config", "name"), [*fields_of(int, float, bool, str)])
def test_another_type(config, name):
    refused(config, name, object())


@pytest.mark.parametrize(("config", "name"), [*fields_of(bool)])
def test_a_text_for_a_switch(config, name):
    refused(config, name, "False")


@pytest.mark.parametrize("name", ["train", "heldout", "tokenizer"])
def test_paths_of_data(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert getattr(configs.Data(**{name: "~/a"}), name) == "/home/me/a"
    refused(configs.Data(), name, "gs://bucket/a")


def test_other_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configs.Supervised(demonstrations="~/a").demonstrations == "/home/me/a"
    assert configs.Experiment(init_from="~/a").init_from == "/home/me/a"
    refused(configs.Supervised(), "demonstrations", 3)
    refused(configs.Supervised(), "demonstrations", "gs://bucket/a")
    refused(configs.Experiment(), "init_from", "gs://bucket/a")
