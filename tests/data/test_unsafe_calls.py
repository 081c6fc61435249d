"""The two packages must neither execute data nor import jax."""

import pathlib
import re

import pytest

import jaxrl_stable.data
import jaxrl_stable.rewards

FORBIDDEN = re.compile(
    r"\beval\(|\bexec\(|\bsympify\(|(?<!`)\bparse_expr\(|import pickle|multiprocessing|shell=True"
    r"|^\s*(import|from) jax\b"
    r"|^(import|from) reasoning_gym|\.score_answer",
    re.MULTILINE,
)


@pytest.mark.fast
@pytest.mark.parametrize("package", [jaxrl_stable.data, jaxrl_stable.rewards])
def test_sources_are_free_of(package):
    files = sorted(pathlib.Path(package.__file__).parent.glob("*.py"))
    assert len(files) >= 6
    for file in files:
        assert not FORBIDDEN.search(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("package", [jaxrl_stable.data, jaxrl_stable.rewards])
def test_public_names_exist(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
