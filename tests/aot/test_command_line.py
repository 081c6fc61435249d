"""The command on a small model: figures, files, and refusals with exit status 2."""

import dataclasses
import json

import pytest

from jaxrl_stable.aot import programs, topology
from jaxrl_stable.aot.__main__ import main, parse
from jaxrl_stable.program import errors_in_one_line

GIN = """
from __gin__ import dynamic_registration
from jaxrl_stable import configs
from jaxrl_stable.model import config as model
configs.Experiment.model = @model.tiny()
configs.Experiment.reinforcement = @configs.Reinforcement()
configs.Experiment.mesh = @configs.MeshShape()
configs.Reinforcement.objective = @configs.Objective()
configs.Objective.mini_batches = 1
configs.Objective.replay = "R2"
configs.Reinforcement.prompts = 4
configs.Reinforcement.group_size = 2
configs.Reinforcement.micro_batch_size = 4
configs.MeshShape.fsdp = 2
model.tiny.num_layers = 1
model.tiny.attention = "xla"
"""


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command; returns its exit status and what it wrote."""
    (tmp_path / "tiny.gin").write_text(GIN)

    def run(*arguments):
        options = parse([f"--gin_file={tmp_path}/tiny.gin", *arguments])
        status = 0
        try:
            with errors_in_one_line(debug=False):
                main(options)
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def compile_once():
    """Compiles the programs once; every test that uses `score` uses the same ones."""
    made, original = [], programs.compiled_programs

    def compiled_programs(*arguments):
        made[:] = made or original(*arguments)
        return iter(made)

    return compiled_programs


@pytest.fixture
def score(slice_of, compile_once, monkeypatch):
    slice_of("v5e:2x2", (4,), ("x",))  # skips without libtpu
    monkeypatch.setattr(programs, "compiled_programs", compile_once)
    return "--topology=v5e:2x2", "--programs=score"


def test_figures_are_printed_and_stored(command, score, tmp_path):
    status, out, _ = command(*score, f"--json={tmp_path}/o.json", f"--hlo={tmp_path}/hlo")
    assert status == 0
    assert out.startswith("v5e:2x2: 4 chips of 15.8 GiB, MeshShape(data=-1, fsdp=2")
    assert "\nscore " in out and "one step at the roofline" in out
    record = json.loads((tmp_path / "o.json").read_text())
    (program,) = record["programs"]
    (part,) = program["parts"]
    assert (record["chips"], program["name"], program["fits"]) == (4, "score", True)
    assert part["sent"]["all-gather"] > 0 and part["unknown"] == []
    assert 0 < part["model_flops"] <= part["flops"]
    assert part["seconds"] == max(part["times"].values()) and part["bound"] in ("HBM", "ICI")
    assert (tmp_path / "hlo" / "score.hlo").read_text().startswith("HloModule")


def test_what_does_not_fit_is_refused(command, score, monkeypatch):
    small = dataclasses.replace(topology.CHIPS["v5e"], hbm=2**16)
    monkeypatch.setitem(topology.CHIPS, "v5e", small)
    status, out, error = command(*score)
    assert status == 2
    assert "\nscore " in out  # the figures are printed all the same
    (line,) = error.strip().splitlines()
    assert line.startswith("error: score needs ") and "which has 64.0 KiB" in line
    assert "the largest is the " in line and "; use a " in line


@pytest.mark.parametrize(
    "bindings, message",
    [
        ({"MeshShape.fsdp": 3}, "MeshShape(data=1, fsdp=3, expert=1, tensor=1"),
        ({"MeshShape.context": 2, "Reinforcement.max_tokens": 31}, "Data.prompt_width + Reinf"),
        ({"Reinforcement.micro_batch_size": 2}, "micro_batch_size is 2; on this mesh"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(slice_of, command, bindings, message):
    arguments = [f"--gin.configs.{name}={value}" for name, value in bindings.items()]
    slice_of("v5e:2x2", (4,), ("x",))
    status, out, error = command("--topology=v5e:2x2", *arguments)
    assert (status, out) == (2, "")
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--topology is missing"),
        (["--topology=v9:2x2"], "the chip is one of v5e, v5p, v6e"),
    ],
)
def test_other_mistakes_are_one_line(command, arguments, message):
    status, _, error = command(*arguments)
    assert status == 2 and message in error and len(error.strip().splitlines()) == 1


def test_an_unknown_program_is_refused(slice_of, command):
    slice_of("v5e:2x2", (4,), ("x",))
    status, _, error = command("--topology=v5e:2x2", "--programs=train")
    assert status == 2 and "--programs=train is unknown; use some of rollout" in error


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert all(flag in out for flag in ("--topology", "--sweep", "--programs", "--gin.NAME=VALUE"))


def test_an_unknown_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--topologies=v5e:2x2", "--chips=4"])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: ") and "--help lists the arguments" in said
