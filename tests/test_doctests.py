"""The examples in docstrings give the results that they show."""

import doctest
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxrl_stable"
WITH_EXAMPLES = [
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]
# The functions that most users call first have examples with numbers.
EXPECTED = {
    "advantages.baselines",
    "corrections",
    "objectives.aggregation",
    "objectives.minirl",
    "routing",
}


@pytest.mark.fast
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


def test_first_functions_have_examples():
    assert {f"jaxrl_stable.{name}" for name in EXPECTED} <= set(WITH_EXAMPLES)
