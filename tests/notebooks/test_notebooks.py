"""Every notebook runs from top to bottom at a small size; its stored outputs are presentable."""

import os
import pathlib
import re
import sys

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(home|root|tmp|work|content|Users|usr|opt|var|mnt)/|[A-Z]:\\\\")
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def plots(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def complaints(notebook):
    """Returns errors, and what was written to stderr."""
    return [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The kernels' environment: the small size, this checkout, and a home of their own."""
    home = tmp_path_factory.mktemp("jupyter")
    return os.environ | {
        "JAXRL_STABLE_SMALL": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "IPYTHONDIR": str(home),
        "JUPYTER_RUNTIME_DIR": str(home),
        "TMPDIR": str(home),
    }


# Those that make whole studies are slow tests, which CI runs.
STUDIES = ("off_policy", "on_policy", "quantised_routing")
SLOW = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in STUDIES))
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", SLOW)
def test_runs_from_top_to_bottom(path, environment):
    """Each notebook runs as stored, in a kernel of its own with this Python."""
    notebook = nbformat.read(path, as_version=4)
    stored = len(plots(notebook))
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    client = NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute(env=environment)  # an error in a cell raises
    finally:
        manager.shutdown_kernel(now=True)  # it holds half a gigabyte
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert not complaints(notebook), complaints(notebook)
    assert len(plots(notebook)) == stored >= 2


@by_name
def test_stored_outputs_are_those_of_a_whole_run(path):
    """They were executed in order, without errors or machine paths, and are not too large."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not complaints(notebook), complaints(notebook)
    assert len(plots(notebook)) >= 2
    texts = [
        str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", ""))
        for o in outputs(notebook)
    ]
    assert any(re.search(r"\d", text) for text in texts), "no figures are stored"
    for text in (*texts, *(cell.source for cell in notebook.cells)):
        assert not MACHINE_PATH.search(text), text
    assert path.stat().st_size < 300_000
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)


@by_name
def test_begins_as_all_of_them_do(path):
    """It begins with a question, then installs; the size is chosen in one place."""
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0].source
    assert first.startswith("# ") and "?" in "".join(first.splitlines()[:8])
    sources = [cell.source for cell in code_cells(notebook)]
    assert "except ImportError:" in sources[0] and "%pip install" in sources[0]
    assert [("JAXRL_STABLE_SMALL" in source) for source in sources] == [
        "SMALL = " in source for source in sources
    ]
    assert sum("JAXRL_STABLE_SMALL" in source for source in sources) == 1


def test_all_are_listed():
    table = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 5
    assert all(f"({path.name})" in table for path in NOTEBOOKS)


def test_links_lead_somewhere():
    """Checks the relative links of the texts and of the table."""
    texts = [(ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")]
    for path in NOTEBOOKS:
        texts += [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    targets = re.findall(r"\]\(([^)#\s]+)", "\n".join(texts))
    local = [target for target in targets if "://" not in target]
    assert len(local) > 5
    for target in local:
        assert (ROOT / "notebooks" / target).exists(), target
