"""The four commands, in process."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_stable import hf
from jaxrl_stable.hf.__main__ import main, parse
from jaxrl_stable.model import init_model, tiny

CONFIG = tiny(vocab_size=40, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    hf.save(init_model(CONFIG, 3), directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def command(*arguments):
    main(parse([*map(str, arguments)]))


def test_inspect_says_what_it_is(checkpoint, capsys):
    command("inspect", checkpoint)
    said = capsys.readouterr().out
    assert "num_experts             8" in said and "in F32" in said and "tokenizer.json" in said


def test_import_then_export_gives_the_same_tensors(checkpoint, tmp_path, capsys):
    command("import", checkpoint, tmp_path / "run")
    assert f"init_from = '{tmp_path / 'run'}'" in capsys.readouterr().out
    assert (tmp_path / "run" / "tokenizer.json").exists()
    command("export", tmp_path / "run", tmp_path / "out", "--dtype=float32")
    one = load_file(checkpoint / "model.safetensors")
    other = load_file(tmp_path / "out" / "model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert hf.read_config(tmp_path / "out") == hf.read_config(checkpoint)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_upcycle_command(tmp_path, capsys):
    dense = tiny(num_experts=0, num_experts_per_token=0, moe_intermediate_size=0)
    hf.save(init_model(dense, 0), tmp_path / "dense")
    command("upcycle", tmp_path / "dense", tmp_path / "moe", "--copies=4", "--chosen=2")
    assert hf.read_config(tmp_path / "moe").num_experts == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nowhere"), "nowhere/config.json does not exist"),
        (("export", "nowhere", "out"), "nowhere/checkpoints contains no checkpoint"),
        (
            ("import", "{checkpoint}", "{used}"),
            "checkpoints already exists; use a new working directory",
        ),
    ],
)
def test_errors_are_one_line(checkpoint, tmp_path, capsys, arguments, message):
    (tmp_path / "used" / "checkpoints").mkdir(parents=True)
    places = dict(checkpoint=checkpoint, used=tmp_path / "used")
    with pytest.raises(SystemExit) as exit:
        command(*(a.format(**places) for a in arguments))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said and said.count("\n") == 1
    assert not pathlib.Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: command"),
        (("inspect",), "the following arguments are required: model"),
        (("import", "model", "run", "--param_dtype=int8"), "invalid choice: 'int8'"),
        (("inspect", "model", "--deep"), "unrecognized arguments: --deep"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        parse(arguments)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: ") and message in said and "--help lists the arguments" in said


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (("--help",), ("inspect", "import", "export", "upcycle", "--debug")),
        (("export", "--help"), ("workdir", "--like", "--best", "--dtype", "--layout")),
    ],
)
def test_help_lists_the_arguments(capsys, arguments, listed):
    with pytest.raises(SystemExit) as exit:
        parse(arguments)
    said = capsys.readouterr()
    assert exit.value.code == 0 and said.err == ""
    assert all(name in said.out for name in listed)
