"""`--dry_run` refuses what a run would refuse: in one line that names the setting, with no traces.

Add a row to `BROKEN` for each new kind of mistake that can be found before the first step, or to
`WRONG_TYPES` if its value has a type that the annotation forbids.
"""

import io
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from jaxrl_stable import evaluate, program, sft, train
from jaxrl_stable.checkpoint import Checkpointer
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.run.identity import data_of_run, settings_of_run
from jaxrl_stable.run.task import load_task

GIN = str(pathlib.Path(__file__).with_name("experiment.gin"))
GOOD = json.dumps({"prompt": "1+1?", "answer": "2"})

pytestmark = pytest.mark.fast


class Broken(NamedTuple):
    """A mistake, and what its line of error has to say.

    Attributes:
      kind: name of the mistake.
      arguments: of the command line; `{dir}` is a temporary directory.
      message: parts of the line, in any order; the setting comes first.
      files: name and content of files in that directory.
    """

    kind: str
    arguments: tuple[str, ...]
    message: tuple[str, ...]
    files: dict[str, str] = {}  # noqa: RUF012


def setting(value, *message, kind="", **files):
    """A mistake in a single binding."""
    return Broken(kind or value, (f"--gin.{value}",), message, files)


def data(kind, line, *message):
    """A mistake in a file of training problems."""
    arguments = ("--gin.configs.Data.train='{dir}/bad.jsonl'",)
    return Broken(kind, arguments, ("bad.jsonl", *message), {"bad.jsonl": f"{GOOD}\n{line}\n"})


REWARDS = "tests.rewards.user_rewards"
MESH = "--gin.configs.Experiment.mesh=@configs.MeshShape()"
CHAT = "--gin.configs.Data.chat=True"
WRONG_TYPES = (
    setting("configs.Reinforcement.steps=1e3", "Reinforcement.steps is 1000.0", "write 1000"),
    setting("configs.Reinforcement.prompts=4.0", "Reinforcement.prompts is 4.0", "write 4"),
    setting("configs.Reinforcement.steps=True", "Reinforcement.steps is True", "an integer"),
    setting("rl/configs.Optimizer.learning_rate='3e-4'", "Optimizer.learning_rate is '3e-4'"),
    setting("configs.Data.chat='False'", "Data.chat is 'False'", "write False, without quotes"),
    setting("configs.Data.tokenizer=['a', 'b']", "Data.tokenizer is ['a', 'b']", "a text"),
    setting("configs.Data.train=[1]", "Data.train is [1]", "JSONL"),
    setting("configs.Experiment.model='tiny'", "Experiment.model is 'tiny'", "ModelConfig"),
    setting("configs.Experiment.reinforcement=@configs.Data()", "Experiment.reinforcement is Data"),
    setting("configs.Objective.loss='gspo'", "Objective.loss is 'gspo'", "@name"),
    setting("objectives.minirl.clip_high='0.2'", "minirl.clip_high is '0.2'", "a number"),
    setting("model.tiny.dtype='bf16'", "ModelConfig.dtype is 'bf16'", "'float32', 'bfloat16'"),
    setting("model.tiny.dtype='float16'", "ModelConfig.dtype is 'float16'", "overflow"),
    setting("model.tiny.dtype='float64'", "ModelConfig.dtype is 'float64'", "in float32"),
    setting("model.tiny.param_dtype='int8'", "ModelConfig.param_dtype is 'int8'"),
)
BROKEN = (
    # --- Ranges
    setting("configs.Reinforcement.steps=-5", "Reinforcement.steps is -5; use at least 0"),
    setting("configs.Reinforcement.top_p=1.5", "Reinforcement.top_p is 1.5", "at most 1"),
    setting("configs.Reinforcement.temperature=0.0", "Reinforcement.temperature is 0.0"),
    setting("configs.Reinforcement.max_failed_rewards=-1.0", "max_failed_rewards is -1.0"),
    setting("configs.Evaluation.temperature=-1.0", "Evaluation.temperature is -1.0"),
    setting("configs.Evaluation.top_p=0.0", "Evaluation.top_p is 0.0; use more than 0"),
    setting("configs.Evaluation.top_k=-1", "Evaluation.top_k is -1"),
    setting("rl/configs.Optimizer.learning_rate=-1.0", "Optimizer.learning_rate is -1.0"),
    setting("rl/configs.Optimizer.learning_rate=1e999", "learning_rate is inf", "a finite number"),
    setting("rl/configs.Optimizer.b1=2.0", "Optimizer.b1 is 2.0", "less than 1"),
    setting("rl/configs.Optimizer.clip_norm=0.0", "Optimizer.clip_norm is 0.0; use more than 0"),
    setting("configs.Supervised.steps=-1", "Supervised.steps is -1"),
    setting("configs.Data.reward_timeout=0.0", "Data.reward_timeout is 0.0"),
    setting("configs.Experiment.seed=-1", "Experiment.seed is -1"),
    setting("configs.Objective.kl_coefficient=-0.1", "Objective.kl_coefficient is -0.1"),
    setting("objectives.minirl.truncation=-1.0", "minirl", "truncation is -1.0"),
    setting("model.tiny.num_kv_heads=0", "ModelConfig.num_kv_heads is 0"),
    Broken("an axis of 0", (MESH, "--gin.configs.MeshShape.fsdp=0"), ("MeshShape.fsdp is 0",)),
    # --- Choices and combinations
    setting("configs.Data.reward='guess'", "'guess'", "numeric"),
    setting("configs.Objective.replay='R4'", "Objective.replay is 'R4'"),
    setting("configs.Reinforcement.micro_batch_size=3", "Reinforcement.micro_batch_size (3)"),
    setting("configs.Reinforcement.prompts=1", "Reinforcement.prompts (1) must be a multiple of"),
    setting("configs.Reinforcement.group_size=1", "Reinforcement.group_size is 1", "at least 2"),
    setting("model.tiny.max_positions=50", "Reinforcement.max_tokens is 48 + 8", "50 positions"),
    Broken(
        "a penalty that the advantages do not know",
        (
            "--gin.configs.Objective.advantages=@advantages.maxrl",
            "--gin.configs.Reinforcement.overlong_buffer=0.5",
        ),
        ("Reinforcement.overlong_buffer", "maxrl"),
    ),
    Broken("rows", (MESH, "--gin.configs.MeshShape.fsdp=3"), ("Reinforcement.", "multiple of 3")),
    # --- Names
    setting("configs.Reinforcement.stepz=3", "stepz", "configs.Reinforcement"),
    setting("HELD_OUT='mine.jsonl'", "the macro HELD_OUT is bound but nothing uses it"),
    setting("configs.Data.train=%TRAIN", "the macro TRAIN is used but not bound"),
    setting(
        "configs.Data.reward=numeric", "configs.Data.reward is bound to numeric", "\"'numeric'\""
    ),
    setting("configs.Data.train='mine.jsonl", "--gin.configs.Data.train='mine.jsonl"),
    setting("configs.Data.train=['a'", "a bracket or quote is never closed in --gin."),
    # --- Data, tokenizer and reward
    setting("configs.Data.train='absent.jsonl'", "absent.jsonl", "check the path"),
    data("no JSON", "{not json", "line 2", "not JSON"),
    data("no answer", '{"prompt": "x"}', "line 2", "'answer' is missing"),
    data("a reference that cannot be read", '{"prompt": "x", "answer": "two"}', "two"),
    setting("configs.Data.prompt_width=5", "prompt width of 5", "records affected"),
    setting("configs.Supervised.length=20", "Supervised.length", "records affected"),
    data("half a character", r'{"prompt": "\ud83d 1+1?", "answer": "2"}', "line 2", "half of a"),
    setting("configs.Data.train=[]", "Data.train is []"),
    setting("configs.Data.template='no place'", "{prompt}"),
    setting("configs.Evaluation.problems=9", "Evaluation.problems is 9"),
    setting("model.tiny.vocab_size=64", "ModelConfig.vocab_size is 64"),
    setting("configs.Data.tokenizer='absent.model'", "absent.model"),
    setting("configs.Data.reward='absent_module:f'", "absent_module"),
    setting(f"configs.Data.reward='{REWARDS}:batched'", "batched(prompts, completions, answer)"),
    setting(f"configs.Data.reward='{REWARDS}:asynchronous'", "asynchronous is async"),
    setting(f"configs.Data.reward='{REWARDS}:indexes_the_response'", "indexes_the_response"),
    Broken("chat without a template", (CHAT,), ("chat",)),
    # --- Paths and origin
    Broken("bucket", ("--workdir=gs://bucket/run",), ("--workdir is 'gs://bucket/run'", "gcsfuse")),
    setting("configs.Data.train='s3://bucket/x'", "Data.train is 's3://bucket/x'", "mount"),
    setting("configs.Experiment.init_from='absent'", "Experiment.init_from is 'absent'"),
    setting("configs.Experiment.init_from='{dir}'", "contains no checkpoint", kind="no checkpoint"),
    Broken("profile", ("--profile_steps=x",), ("--profile_steps is 'x'",)),
)


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """Runs the training program in this process; returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def start(*arguments, module=train):
        arguments = [each.replace("{dir}", str(tmp_path)) for each in arguments]
        argv = ["train", f"--gin_file={GIN}", "--workdir=run", "--dry_run", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        flags.FLAGS.unparse_flags()
        status = 0
        try:
            program.run(module.main, program.EXPERIMENT._replace(check=module.check))
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    yield start
    flags.FLAGS.unparse_flags()


ROWS = (
    *(pytest.param(row, id=row.kind, marks=pytest.mark.refusal) for row in WRONG_TYPES),
    *(pytest.param(row, id=row.kind) for row in BROKEN),
)


@pytest.mark.parametrize("broken", ROWS)
def test_mistakes(broken, dry_run, tmp_path):
    for name, content in broken.files.items():
        (tmp_path / name).write_text(content)
    status, _, errors = dry_run(*broken.arguments)
    assert status == 2, errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    for part in broken.message:
        assert part in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == broken.files.keys()


def test_a_good_configuration_leaves_no_trace(dry_run, tmp_path):
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        status, printed, errors = dry_run()
        assert jax.config.jax_compilation_cache_dir is None  # a run has it in its directory
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    assert status == 0, errors
    assert "configs.Objective.mini_batches = 2" in printed and "key/value cache" in printed
    assert not list(tmp_path.iterdir())


def test_the_home_directory_is_expanded(dry_run, tmp_path):
    """The shell leaves `--workdir=~/run` and quoted bindings as they are."""
    (tmp_path / "mine.jsonl").write_text(GOOD + "\n")
    status, printed, errors = dry_run("--workdir=~/run", "--gin.configs.Data.train='~/mine.jsonl'")
    assert status == 0, errors
    assert "~/mine.jsonl" in printed
    (tmp_path / "own.gin").write_text("from __gin__ import dynamic_registration\n")
    status, _, errors = dry_run("--gin_file=~/own.gin")
    assert status == 0, errors
    _, _, errors = dry_run("--gin.configs.Data.tokenizer='~/absent.model'")
    assert f"{tmp_path}/absent.model" in errors


def test_the_tokenizer_that_a_run_has_trained(dry_run, tmp_path):
    """A run that ended before its first checkpoint has one already, and goes on with it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.model").write_bytes(b"damaged")
    status, _, errors = dry_run()
    assert status == 2 and "tokenizer.model" in errors and errors.count("\n") == 1


def test_weights_of_another_model(dry_run, tmp_path):
    """Found by the architecture alone: no weights are read."""
    model = tiny(vocab_size=96, hidden_size=32, num_layers=2, num_experts=4)
    with Checkpointer(tmp_path / "old" / "checkpoints", model.architecture(), 1) as checkpoints:
        checkpoints.save(1, {"model": init_model(model, 0)}, None, None)
    status, _, errors = dry_run("--gin.configs.Experiment.init_from='old'")
    assert status == 2 and "old holds a different model: num_layers is 2 there and 1 here" in errors


def test_a_run_that_ended_in_its_cold_start(dry_run, tmp_path):
    """It has a checkpoint, but none to resume from in training."""
    assert dry_run()[0] == 0
    (tmp_path / "run" / "cold_start" / "checkpoints" / "4").mkdir(parents=True)
    with load_task(load_experiment([GIN]), tmp_path / "run"):
        before = sorted(tmp_path.rglob("*"))
    status, _, errors = dry_run()
    assert status == 0, errors
    status, _, errors = dry_run("--gin.configs.Supervised.length=20")
    assert status == 2 and "Supervised.length" in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_would_not_resume(dry_run, tmp_path):
    """A dry run in the working directory of a run compares it with its newest checkpoint."""
    assert dry_run()[0] == 0
    experiment = load_experiment([GIN])
    (tmp_path / "run").mkdir()
    with load_task(experiment, tmp_path / "run") as task:
        data = data_of_run(experiment, task.identity)
        settings = settings_of_run(experiment, task.heldout, task.reward)
    architecture = experiment.model.architecture()
    with Checkpointer(
        tmp_path / "run" / "checkpoints", architecture, data=data, settings=settings
    ) as checkpoints:
        checkpoints.save(1, {"key": jnp.zeros(1)}, None, None)
    before = sorted(tmp_path.rglob("*"))
    status, _, errors = dry_run()
    assert status == 0, errors
    status, _, errors = dry_run("--gin.configs.Experiment.seed=1")
    assert status == 2 and "seed 0 but the data is now" in errors and errors.count("\n") == 1
    status, _, errors = dry_run("--gin.configs.Evaluation.samples=3")
    assert status == 2 and "Evaluation.samples is 2 there and 3 here" in errors
    status, _, errors = dry_run("--gin.model.tiny.num_layers=2")
    assert status == 2 and "num_layers is 1 there and 2 here" in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_other_programs(dry_run):
    status, _, errors = dry_run(module=evaluate)
    assert status == 2 and "run/checkpoints contains no checkpoint" in errors
    status, _, errors = dry_run("--gin.configs.Experiment.cold_start=None", module=sft)
    assert status == 2 and "Experiment.cold_start is missing" in errors


def test_double_precision(dry_run):
    jax.config.update("jax_enable_x64", True)
    try:
        status, _, errors = dry_run()
    finally:
        jax.config.update("jax_enable_x64", False)
    assert status == 2 and "JAX_ENABLE_X64 is on" in errors and errors.count("\n") == 1


def test_a_device_that_is_not_there(dry_run, monkeypatch):
    """For JAX_PLATFORMS=cuda without a GPU jax raises an assertion without a message."""

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    status, _, errors = dry_run()
    assert status == 2 and "JAX_PLATFORMS is 'cpu', but jax cannot use it here" in errors
    assert errors.count("\n") == 1


def test_an_ascii_terminal(dry_run, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    status, *_ = dry_run()
    out.flush()
    assert status == 0 and b"4 prompts ? 4 = 16 rows" in out.buffer.getvalue()
    status, *_ = dry_run("--gin.configs.Data.reward='µ'")
    err.flush()
    assert status == 2 and b"error: " in err.buffer.getvalue()
