"""The tests mirror the package."""

import pathlib

import pytest

from tests.conftest import LONGEST

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "jaxrl_stable"

# Folders of tests without a package of the same name, and what they test instead.
OTHER = {
    "catalogue": "bugs of other systems, which cross packages",
    "integrations": "experiments/integrations",
    "launch": "launch/",
    "notebooks": "notebooks/",
    "parity": "transformers and TRL, in an environment of their own",
}
# Packages without a folder of tests, and where their tests are instead.
ELSEWHERE: dict[str, str] = {}


def packages(root: pathlib.Path) -> set[str]:
    """Returns the folders below `root` that hold Python files, relative to it."""
    folders = {path.parent.relative_to(root).as_posix() for path in root.rglob("*.py")}
    return folders - {"."}


@pytest.mark.fast
def test_every_package_has_its_tests():
    missing = packages(PACKAGE) - packages(TESTS)
    assert missing == set(ELSEWHERE), "add tests/FOLDER, or a line that says where the tests are"


@pytest.mark.fast
def test_every_folder_of_tests_has_its_package():
    assert packages(TESTS) - packages(PACKAGE) == set(OTHER), "move it, or say what it tests"


@pytest.mark.fast
@pytest.mark.parametrize("folder", [".", *sorted(packages(TESTS))])
def test_helpers_are_imported_by_package(folder):
    """Without `__init__.py`, pytest imports a folder's files by their bare names."""
    assert (TESTS / folder / "__init__.py").exists()


@pytest.mark.fast
def test_no_folder_is_empty():
    """A folder with only `__init__.py` would count as the tests of a package."""
    for folder in packages(TESTS):
        assert any((TESTS / folder).rglob("test_*.py")), folder


@pytest.mark.fast
def test_the_files_that_start_first_exist():
    stems = {path.stem for path in TESTS.rglob("test_*.py")}
    assert set(LONGEST) <= stems, set(LONGEST) - stems
