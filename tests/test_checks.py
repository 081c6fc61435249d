"""Checks of config fields, by hand."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import checks

pytestmark = pytest.mark.fast


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = 1
    rate: float = 0.5
    either: int | float = 1
    on: bool = True
    name: str = ""
    limit: int | None = None
    ratio: float | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    functions: Sequence[Callable[..., Any]] = ()
    function: Callable[..., Any] = max
    inner: Inner = Inner()
    optional: Inner | None = None
    words: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    anything: Any = None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"count": np.int64(3)},
        {"count": jnp.int32(3)},
        {"rate": 1},
        {"rate": np.float32(1)},
        {"rate": jnp.float32(1)},
        {"limit": 3, "ratio": 2, "either": 0.5},
        {"sizes": (1, 2), "pair": (1, 2)},
        {"sizes": [1, 2]},
        {"functions": [max, min], "function": functools.partial(max, 1)},
        {"optional": Inner(2), "words": {"a": 1}, "anything": range(3)},
    ],
    ids=str,
)
def test_types_that_fit(fields):
    checks.field_types(Config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 1e3}, r"Config\.count is 1000\.0 \(float\); write 1000, without a point"),
        ({"count": 1.5}, r"Config\.count is 1\.5 \(float\); use an integer$"),
        ({"count": True}, r"Config\.count is True \(bool\); use an integer"),
        ({"count": None}, r"Config\.count is None \(NoneType\); use an integer"),
        ({"count": np.float32(1)}, r"Config\.count is .*1\.0.*; use an integer"),
        ({"count": np.array([1])}, r"Config\.count is array\(\[1\]\) \(ndarray\); use an integer"),
        ({"rate": "1e-3"}, r"Config\.rate is '1e-3' \(str\); use a number, without quotes"),
        ({"rate": True}, r"Config\.rate is True \(bool\); use a number"),
        ({"either": "1"}, r"Config\.either is '1' \(str\); use an integer or a number, without"),
        ({"on": "False"}, r"Config\.on is 'False' \(str\); write False, without quotes"),
        ({"on": 1}, r"Config\.on is 1 \(int\); use True or False"),
        ({"name": 3}, r"Config\.name is 3 \(int\); use a text in quotes"),
        ({"limit": 2.0}, r"Config\.limit is 2\.0 \(float\); write 2, without a point"),
        ({"ratio": "x"}, r"Config\.ratio is 'x' \(str\); use a number or None, without quotes"),
        ({"sizes": 3}, r"Config\.sizes is 3 \(int\); use a list of int"),
        ({"sizes": (1, "2")}, r"Config\.sizes is \(1, '2'\) \(tuple\); use a list of int"),
        ({"pair": (1.0,)}, r"Config\.pair is \(1\.0,\) \(tuple\); use a list of float"),
        ({"functions": ["max"]}, r"Config\.functions is \['max'\] \(list\); use a list of values"),
        ({"function": "max"}, r"Config\.function is 'max' \(str\); use a function, bound as @name"),
        ({"inner": 3}, r"Config\.inner is 3 \(int\); use an Inner, bound as @…Inner\(\)"),
        ({"optional": Config}, r"Config\.optional is <class .*; use an Inner, .* or None"),
        ({"words": [1]}, r"Config\.words is \[1\] \(list\); use a dictionary"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.refusal
def test_types_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        checks.field_types(Config(**fields))


def test_a_traced_number_passes():
    """A study maps runs over learning rates."""

    def check(rate):
        config = Config(rate=rate)
        checks.field_types(config)
        checks.within(config, "rate", above=0)
        return rate

    jax.eval_shape(check, jnp.float32(1))


def test_a_long_value_is_cut():
    with pytest.raises(ValueError) as error:
        checks.field_types(Config(words=["x" * 1000]))
    assert len(str(error.value)) < 150


test_a_long_value_is_cut = pytest.mark.refusal(test_a_long_value_is_cut)


@pytest.mark.parametrize(
    ("value", "ends", "message"),
    [
        (0, dict(at_least=1), "count is 0; use at least 1$"),
        (0, dict(above=0), "count is 0; use more than 0$"),
        (2, dict(at_least=0, at_most=1), "count is 2; use at least 0 and at most 1$"),
        (1, dict(above=0, below=1), "count is 1; use more than 0 and less than 1$"),
        (-1, dict(at_least=0, at_most=1), "count is -1; use"),
    ],
    ids=str,
)
def test_numbers_out_of_range(value, ends, message):
    with pytest.raises(ValueError, match=message):
        checks.within(Config(count=value), "count", **ends)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError, match=rf"Config\.rate is {value}; use a finite number$"):
        checks.within(Config(rate=value), "rate")
    with pytest.raises(ValueError, match=r"use a finite number, at least 0$"):
        checks.within(Config(rate=value), "rate", at_least=0)


def test_numbers_in_range():
    checks.within(Config(), "count", at_least=1, at_most=1)
    checks.within(Config(), "limit", "ratio", above=0)  # None
    checks.within(Config(rate=-5.0), "rate")


def loss(logp, *, low: float = 0.2, cap: float | None = None, form: str = "a"):
    """A function with options, as gin binds it."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": "0.2"}, r"loss\.low is '0\.2' \(str\); use a number, without quotes"),
        ({"cap": math.nan}, r"loss\.cap is nan; use a number"),
        ({"form": 3}, r"loss\.form is 3 \(int\); use a text in quotes"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        checks.bound_options(functools.partial(loss, **options))
    nested = functools.partial(functools.partial(loss, **options), 1)
    with pytest.raises(ValueError, match=message):
        checks.bound_options(nested)


def test_options_that_fit():
    checks.bound_options(loss)
    checks.bound_options(functools.partial(loss, low=1, cap=None, other=3))
    outer = functools.partial(functools.partial(loss, low="replaced"), low=0.5)
    checks.bound_options(outer)


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert checks.local_path("--workdir", "~/runs/a") == "/home/me/runs/a"
    assert checks.local_path("--workdir", "runs/a:b") == "runs/a:b"
    assert checks.local_path("--workdir", "") == ""
    for path in ("gs://bucket/run", "s3://bucket", "hf://x/y", "file:///x"):
        with pytest.raises(ValueError, match=rf"^--workdir is '{path}', but only paths of mounted"):
            checks.local_path("--workdir", path)


def test_paths_of_a_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = Config(name="~/a", anything=["~/b", pathlib.Path("c")], words={"a": 1})
    checks.expand_paths(config, "name", "anything", "words", "limit")
    assert (config.name, config.anything) == ("/home/me/a", ["/home/me/b", "c"])
    assert config.words == {"a": 1} and config.limit is None
    problems = [{"prompt": "1+1?"}]
    config = Config(anything=problems)
    checks.expand_paths(config, "anything")
    assert config.anything is problems
    with pytest.raises(ValueError, match=r"Config\.anything is 's3://x'"):
        checks.expand_paths(Config(anything=("a", "s3://x")), "anything")


@pytest.mark.parametrize("value", [3, True, {"a": 1}, [], [1], ["a", 1], ["a", {}], max])
def test_what_is_no_source(value):
    with pytest.raises(ValueError, match=r"Config\.anything is .*; use the path of a JSONL file"):
        checks.sources(Config(anything=value), "anything")


def test_sources():
    paths = ["a.jsonl", pathlib.Path("b.jsonl")]
    for value in (None, *paths, paths, [*paths, range(3)], [{"prompt": "1+1?"}], range(3)):
        checks.sources(Config(anything=value), "anything")
