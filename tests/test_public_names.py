import importlib
import json
import pkgutil
import subprocess
import sys
import types

import pytest

import jaxrl_stable


@pytest.mark.fast
def test_public_names_resolve_and_hide_no_module():
    modules = {module.name for module in pkgutil.iter_modules(jaxrl_stable.__path__)}
    for name in jaxrl_stable._HOME:
        home = importlib.import_module(f"jaxrl_stable.{jaxrl_stable._HOME[name]}")
        assert getattr(jaxrl_stable, name) is getattr(home, name)
        assert name not in modules
    with pytest.raises(AttributeError, match="nothing_here"):
        jaxrl_stable.nothing_here  # noqa: B018


@pytest.mark.fast
def test_a_star_import_binds_the_public_names_and_no_module():
    names = {}
    exec("from jaxrl_stable import *", names)
    names.pop("__builtins__")
    assert names.keys() == jaxrl_stable._HOME.keys()
    assert not [name for name, value in names.items() if isinstance(value, types.ModuleType)]


@pytest.mark.fast
def test_pdoc_finds_the_public_names_and_all_modules_except_programs():
    """pdoc omits what `__all__` does not list; importing a program would define its flags."""
    script = (
        "import json, sys; sys.modules['pdoc'] = sys; "
        "import jaxrl_stable; print(json.dumps(jaxrl_stable.__all__))"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE)
    modules = {module.name for module in pkgutil.iter_modules(jaxrl_stable.__path__)}
    public = {name for name in modules if not name.startswith("_")} - {"train", "sft", "evaluate"}
    assert sorted(json.loads(printed.stdout)) == sorted(public | jaxrl_stable._HOME.keys())


@pytest.mark.fast
def test_importing_the_package_is_light():
    script = "import sys, jaxrl_stable; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
