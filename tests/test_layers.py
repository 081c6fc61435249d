"""Imports go programs → run → sampler → trainer → model → sharding, and never back."""

from __future__ import annotations

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxrl_stable"

# From top to bottom. A module imports from its own line (no cycles) and from the lines below it.
LAYERS = [
    "programs",  # train, sft, evaluate, and each `__main__`
    "study aot",
    "program",
    "run",
    "report sampler",
    "trainer",
    "gin_files",
    "hf",
    "checkpoint configs trajectory",
    "array_tasks data distributed model objective published rewards",
    "routing sharding",
    "corrections diagnostics",
    "advantages",
    "objectives statistics",
    "importance",
    "array_types checks files text",
]
LEVEL = {room: -i for i, line in enumerate(LAYERS) for room in line.split()}
PROGRAMS = {"train", "sft", "evaluate"}
ANYWHERE = {"_moved"}  # old import paths
MAX_ROOT_MODULES = 20

pytestmark = pytest.mark.fast


def name_of(path: pathlib.Path) -> str:
    """Returns the dotted name below the package; "" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Returns the folder or root module that a module belongs to."""
    if module in PROGRAMS or module.endswith("__main__"):
        return "programs"
    return module.split(".")[0]


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: pathlib.Path) -> set[str]:
    """Returns the modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                s if s.removeprefix("jaxrl_stable.") in MODULES else node.module for s in submodules
            ]
        else:
            continue
        found |= {
            n.removeprefix("jaxrl_stable").lstrip(".")
            for n in names
            if n.startswith("jaxrl_stable")
        }
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items() if module}


def test_every_module_has_a_layer():
    rooms = {room_of(module) for module in IMPORTS} - ANYWHERE
    assert rooms == set(LEVEL), rooms ^ set(LEVEL)


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_downwards(module):
    for imported in IMPORTS[module]:
        assert imported, f"{module} imports the package itself; import the module"
        here, there = room_of(module), room_of(imported)
        if here == there or {here, there} & ANYWHERE:
            continue
        assert LEVEL[there] < LEVEL[here], f"{module} imports {imported}, which is not below it"


def test_no_module_imports_in_a_circle():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_nothing_imports_a_program():
    for module, imported in IMPORTS.items():
        programs = {name for name in imported if room_of(name) == "programs"}
        assert not programs, f"{module} imports {programs}"


def test_the_root_stays_small():
    root = [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(root) <= MAX_ROOT_MODULES, sorted(path.name for path in root)
