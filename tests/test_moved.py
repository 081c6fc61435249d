"""Old import paths: each works, gives today's object, and says where it has moved."""

import importlib
import importlib.util
import sys
import types
import warnings

import pytest

import jaxrl_stable
from jaxrl_stable import _moved
from jaxrl_stable._moved import MODULES, NAMES

# Modules today, functions of the package before and after.
CALLABLE = ("quantize", "rollout", "update")

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def forget_old_modules():
    """Imports every old module anew, and leaves the package as it was."""
    attributes = dict(vars(jaxrl_stable))
    _forget()
    yield
    _forget()
    for name in CALLABLE:
        vars(jaxrl_stable).pop(name, None)
        if name in attributes:
            setattr(jaxrl_stable, name, attributes[name])


def _forget():
    for old in MODULES:
        if sys.modules.pop(f"jaxrl_stable.{old}", None) is not None:
            parent, _, child = f"jaxrl_stable.{old}".rpartition(".")
            vars(sys.modules[parent]).pop(child, None)


def user(code):
    """Runs a user's code; returns its names and the warnings that Python shows by default."""
    names = {"__name__": "user"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", FutureWarning)
        exec(compile(code, "user.py", "exec"), names)
    lines = [each for each in caught if issubclass(each.category, FutureWarning)]
    if not hasattr(_moved.install, "__wrapped__"):  # a type checker adds stack frames
        assert {each.filename for each in lines} <= {"user.py"}, "points at the import, not at us"
    return names, [str(each.message) for each in lines]


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_says_where_it_is_and_holds_the_same_objects(old):
    new = importlib.import_module(f"jaxrl_stable.{MODULES[old]}")
    names, lines = user(f"import jaxrl_stable.{old} as found\nimport jaxrl_stable.{old}")
    assert lines == [f"jaxrl_stable.{old} has moved; write {new.__name__}"]
    for name, value in vars(new).items():
        if (old, name) not in NAMES and not name.startswith("__"):
            assert getattr(names["found"], name) is value, name


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_an_old_name_says_where_it_is_and_is_the_same_object(module, name):
    user(f"import jaxrl_stable.{module}")  # its own warning is tested above
    home, new_name = NAMES[module, name]
    names, lines = user(f"from jaxrl_stable.{module} import {name} as found")
    new = f"jaxrl_stable.{home}.{new_name}"
    if name in vars(sys.modules[f"jaxrl_stable.{module}"]):  # the module uses the name itself
        assert not lines
    else:
        assert lines == [f"jaxrl_stable.{module}.{name} has moved; write {new}"]
    assert names["found"] is getattr(importlib.import_module(f"jaxrl_stable.{home}"), new_name)


@pytest.mark.parametrize("name", CALLABLE)
def test_a_function_that_was_a_module_stays_callable(name):
    before, lines = user(f"from jaxrl_stable import {name} as found")
    assert isinstance(before["found"], types.FunctionType) and not lines
    after, lines = user(f"import jaxrl_stable.{name}\nfrom jaxrl_stable import {name} as found")
    assert len(lines) == 1
    assert isinstance(after["found"], types.ModuleType) and callable(after["found"])
    assert getattr(after["found"], name) is before["found"]
    with pytest.raises(TypeError):
        after["found"]()


def test_an_old_module_passes_all_arguments_on(monkeypatch):
    old = "rollout"
    found = user(f"import jaxrl_stable.{old}\nfrom jaxrl_stable import {old} as found")[0]["found"]
    monkeypatch.setattr(found, "rollout", lambda *args, **kwargs: (args, kwargs))
    assert found(1, sampling=2) == ((1,), {"sampling": 2})


@pytest.mark.parametrize("code", ["import jaxrl_stable.nowhere", "import nowhere.rollout"])
def test_other_paths_do_not_exist(code):
    with pytest.raises(ModuleNotFoundError):
        user(code)


def test_other_names_do_not_exist():
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        user("from jaxrl_stable.metrics import nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        user("from jaxrl_stable.train import nothing")


def test_no_old_path_has_been_taken_again():
    """A real module would hide the entry, and its warning would never be shown."""
    user("import jaxrl_stable")
    hidden = [old for old in MODULES if importlib.util.find_spec(f"jaxrl_stable.{old}").origin]
    assert not hidden
