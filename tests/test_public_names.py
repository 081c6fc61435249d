import importlib
import pkgutil
import subprocess
import sys

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
def test_the_flat_names_and_all_modules_except_programs_are_public():
    """pdoc leaves out what `__all__` does not list; a program's flags are for itself alone."""
    modules = {module.name for module in pkgutil.iter_modules(jaxrl_stable.__path__)}
    public = {name for name in modules if not name.startswith("_")} - {"train", "sft", "evaluate"}
    assert sorted(jaxrl_stable.__all__) == sorted(public | jaxrl_stable._HOME.keys())


@pytest.mark.fast
def test_importing_the_package_is_light():
    script = "import sys, jaxrl_stable; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
