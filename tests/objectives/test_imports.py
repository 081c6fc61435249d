"""The loss must be usable in other code bases: it pulls in jax and numpy only."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax, numpy
before = set(sys.modules)
import jaxrl_stable.objectives, jaxrl_stable.importance, jaxrl_stable.advantages
import jaxrl_stable.diagnostics
new = {name.split('.')[0] for name in set(sys.modules) - before}
third_party = new - set(sys.stdlib_module_names) - {'jaxrl_stable'}
assert not third_party, third_party
inside = {name for name in sys.modules if name.startswith('jaxrl_stable.')}
allowed = ('objectives', 'importance', 'advantages', 'diagnostics')
assert all(name.split('.')[1] in allowed for name in inside), inside
"""


@pytest.mark.fast
def test_objectives_import_jax_and_numpy_only():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
