"""Agreement with transformers, for every supported architecture and every way in and out.

Needs torch and transformers (the extra "parity", best in a separate environment).
"""

import functools
import pathlib
import tempfile

import pytest

HINT = "needs torch and transformers 5.24: pip install -e '.[test,parity]'"
pytest.importorskip("torch", reason=HINT)
pytest.importorskip("transformers", minversion="5.24", reason=HINT)

from tests.parity import measure  # noqa: E402  (it needs both)


@functools.cache
def errors(name):
    with tempfile.TemporaryDirectory() as directory:
        return measure.measure(name, pathlib.Path(directory))


@pytest.mark.parametrize("check", measure.CHECKS)
@pytest.mark.parametrize("name", measure.zoo.ZOO)
def test_parity(name, check):
    assert errors(name)[check] <= measure.CHECKS[check].tolerance, measure.CHECKS[check].description
