"""Flags and help of the programs; nothing else defines a flag."""

import importlib
import subprocess
import sys

import pytest
from absl import flags

from jaxrl_stable import program, train
from jaxrl_stable.run.profile import ProfileSteps

SHARED = ("--gin_file=…", "--workdir=…", "--dry_run", "--debug", "--gin.NAME=VALUE")
PROGRAMS = {
    "train": ["--profile_steps=…"],
    "sft": [],
    "evaluate": ["--checkpoint=…", "<latest|best>", "(default: 'latest')"],
    "study.__main__": [],
}

# Packages that this one imports define flags, too; only flags of modules of this one count.
IMPORT_EVERYTHING = """
import importlib, pkgutil
import jaxrl_stable
from absl import flags

programs = {"train", "sft", "evaluate"}
count = 0
for module in pkgutil.walk_packages(jaxrl_stable.__path__, "jaxrl_stable."):
    _, name, *rest = module.name.split(".")
    if not (name in programs or rest[-1:] == ["__main__"]):
        importlib.import_module(module.name)
        count += 1
assert count > 100, count
ours = {name: found for name, found in flags.FLAGS.flags_by_module_dict().items()
        if name.startswith("jaxrl_stable")}
assert not ours, ours
"""


def python(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.fast
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_the_program_does_and_names_its_flags(name, flag, monkeypatch, capsys):
    module = importlib.import_module(f"jaxrl_stable.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--gin.x=1", flag])
    program.run(module.main)  # returns: exit status 0
    out = capsys.readouterr().out
    assert out.startswith(module.__doc__.strip())
    assert all(part in out for part in (*SHARED, *PROGRAMS[name]))
    own = {part for parts in PROGRAMS.values() for part in parts}
    assert not any(part in out for part in own - set(PROGRAMS[name]))


@pytest.mark.fast
def test_help_of_a_program_that_python_started():
    """Run as a script, its module is `__main__`, and absl names its flags after the file."""
    result = python("-m", "jaxrl_stable.train", "--help")
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert result.stdout.startswith(train.__doc__.strip())
    assert "--profile_steps=…" in result.stdout


@pytest.mark.fast
def test_a_flag_of_another_program_is_refused():
    result = python("-m", "jaxrl_stable.train", "--checkpoint=best")
    assert result.returncode != 0
    assert "Unknown command line flag 'checkpoint'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.fast
def test_only_programs_define_flags():
    result = python("-c", IMPORT_EVERYTHING)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def run_main(monkeypatch, tmp_path, capsys):
    """Runs the training program up to `train`; returns its exit status, steps to trace, stderr."""
    seen = []

    def stop(experiment, workdir, profile_steps):
        seen.append(profile_steps)
        raise SystemExit(0)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", f"--workdir={tmp_path}", *arguments])
        with pytest.raises(SystemExit) as error:
            program.run(train.main)
        return error.value.code, seen, capsys.readouterr().err

    monkeypatch.setattr(train, "train", stop)
    yield run
    flags.FLAGS.unparse_flags()


@pytest.mark.fast
def test_profile_steps_reach_the_run(run_main):
    assert run_main("--profile_steps=3:6") == (0, [ProfileSteps(3, 6)], "")


@pytest.mark.fast
def test_profile_steps_out_of_order_are_one_line(run_main):
    code, seen, err = run_main("--profile_steps=6:3")
    assert code == 2 and not seen
    assert err.startswith("error: --profile_steps is '6:3'") and err.count("\n") == 1
