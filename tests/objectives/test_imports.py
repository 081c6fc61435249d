"""The loss must be usable in other code bases: it pulls in jax and numpy only."""

import pathlib
import subprocess
import sys

import pytest

NEW_MODULES = """
import sys
import jax, numpy
before = set(sys.modules)
import jaxrl_stable.objectives, jaxrl_stable.importance, jaxrl_stable.advantages
import jaxrl_stable.corrections, jaxrl_stable.diagnostics, jaxrl_stable.published
new = {name.split('.')[0] for name in set(sys.modules) - before}
third_party = new - set(sys.stdlib_module_names) - {'jaxrl_stable'}
assert not third_party, third_party
inside = {name for name in sys.modules if name.startswith('jaxrl_stable.')}
modules = '_moved array_types importance advantages corrections diagnostics published'.split()
modules.append('objectives')
assert all(name.split('.')[1] in modules for name in inside), inside
"""

# From here on, imports of anything else fail even if it is installed, including late ones inside
# functions: the environment of a user who has only jax.
WALL = """
import runpy, sys
needs_of_jax = {'jax', 'jaxlib', 'numpy', 'scipy', 'ml_dtypes', 'opt_einsum'}
allowed = needs_of_jax | {'jaxrl_stable'} | set(sys.stdlib_module_names)

class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.split('.')[0]
        if top in allowed or top.startswith('_sysconfigdata'):  # stdlib, named by the platform
            return self.finder.find_spec(name, path, target)

for name in list(sys.modules):  # loaded when the interpreter started
    if name.split('.')[0] not in allowed | {'__main__'}:
        del sys.modules[name]
sys.meta_path[:] = map(Only, sys.meta_path)
for name in ('flax', 'jaxtyping', 'optax', 'absl', 'pytest'):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f'{name} came through')
runpy.run_path(sys.argv[1])
"""


@pytest.mark.fast
def test_objectives_import_jax_and_numpy_only():
    subprocess.run([sys.executable, "-c", NEW_MODULES], check=True)


@pytest.mark.fast
def test_a_loss_where_nothing_else_can_be_imported():
    script = pathlib.Path(__file__).with_name("nothing_but_jax.py")
    command = [sys.executable, "-c", WALL, str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "a loss with nothing but jax", result.stderr
