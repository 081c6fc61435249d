"""What gin builds, and which bindings without effect are refused."""

import functools
import pathlib
from typing import ClassVar

import pytest

from jaxrl_stable import gin_files
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.model import ModelConfig, tiny
from jaxrl_stable.objectives import cispo, reinforce

HEAD = f"""\
from __gin__ import dynamic_registration
from jaxrl_stable import configs
from jaxrl_stable import objectives
import {__name__} as own
"""
IMPORT = f"import {__name__} as own"  # for names on the command line


class Source:
    """A user's source, which counts how often it is built."""

    made: ClassVar[list[int]] = []

    def __init__(self, size: int = 4, other: int = 0):
        self.made.append(size)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"prompt": "1+1?", "answer": "2"}


def small(layers: int = 1) -> ModelConfig:
    return tiny(num_layers=layers)


def smaller(layers: int = 1) -> ModelConfig:
    return tiny(num_layers=layers, hidden_size=16)


@functools.wraps(reinforce)
def decorated(*arrays):
    return reinforce(*arrays)


WIRED = """
configs.Experiment.reinforcement = @configs.Reinforcement()
configs.Reinforcement.optimizer = @rl/configs.Optimizer()
rl/configs.Optimizer.learning_rate = 1e-3
configs.Experiment.cold_start = @configs.Supervised()
configs.Supervised.steps = 3
"""
OTHER = "configs.Experiment.seed = 1"  # what a later file binds instead

pytestmark = pytest.mark.fast


@pytest.fixture
def load(tmp_path):
    """Writes each text to a gin file and loads them, with bindings of the command line."""
    Source.made.clear()

    def load(*texts, bindings=()):
        paths = [tmp_path / f"{number}.gin" for number in range(len(texts))]
        for path, text in zip(paths, texts):
            path.write_text(HEAD + text)
        return load_experiment([str(path) for path in paths], bindings)

    return load


def test_an_experiment_is_built_once_from_all_files_together(load):
    """A source may read gigabytes; a build after each file would also see half of the bindings."""
    data = """
configs.Experiment.data = @configs.Data()
configs.Data.train = @own.Source()
own.Source.size = 5
"""
    experiment = load(data, "own.Source.size = 6", bindings=[IMPORT, "own.Source.other = 1"])
    assert Source.made == [6]
    assert isinstance(experiment.data.train, Source) and experiment.data.heldout is None


def test_each_reference_is_one_object(load):
    data = """
configs.Experiment.data = @configs.Data()
configs.Data.train = @train/own.Source()
configs.Data.heldout = @heldout/own.Source()
train/own.Source.size = 5
heldout/own.Source.size = 6
"""
    load(data, OTHER)
    assert sorted(Source.made) == [5, 6]


def test_what_a_later_file_replaces_is_not_built(load):
    data = """
configs.Experiment.data = @configs.Data()
configs.Data.train = @big/own.Source()
big/own.Source.size = 1_000_000
"""
    load(data, "configs.Data.train = @own.Source()\nown.Source.size = 2")
    assert Source.made == [2]


def test_a_decorated_loss_is_the_one_that_is_used(load):
    loss = "configs.Objective.loss = @own.decorated"
    objective = "configs.Reinforcement.objective = @configs.Objective()"
    found = load(WIRED, f"{objective}\n{loss}").reinforcement.objective.loss
    assert found is decorated and found.__wrapped__ is reinforce


def test_a_decorated_loss_that_gin_does_not_know_stays_as_it_is(load):
    loss = "configs.Objective.loss = @objectives.reinforce"
    load(WIRED, f"configs.Reinforcement.objective = @configs.Objective()\n{loss}")
    own = functools.wraps(reinforce)(lambda *arrays: reinforce(*arrays))
    assert gin_files.settled(own) is own


UNREAD = {
    "a section that nothing refers to": ("configs.MeshShape.data = 1", "configs.MeshShape.data"),
    "a scope that nothing uses": (
        WIRED + "lr/configs.Optimizer.b1 = 0.5",
        "lr/configs.Optimizer.b1",
    ),
    "the field without the scope that is used, which has its own": (
        WIRED + "configs.Optimizer.learning_rate = 0.5",
        "configs.Optimizer.learning_rate",
    ),
    "a scope inside the one that is used": (
        WIRED + "rl/inner/configs.Optimizer.b1 = 0.5",
        "rl/inner/configs.Optimizer.b1",
    ),
    "an outer scope that an inner one of its own file hides": (
        "configs.Experiment.reinforcement = @configs.Reinforcement()\n"
        "configs.Reinforcement.optimizer = @run/rl/configs.Optimizer()\n"
        "run/configs.Optimizer.b1 = 0.5\n"
        "run/rl/configs.Optimizer.b1 = 0.6",
        "run/configs.Optimizer.b1",
    ),
    "options of a loss that is not the objective's": (
        "objectives.gspo.clip_low = 1e-3",
        "objectives.gspo.clip_low",
    ),
    "a section behind a macro that nothing reads": (
        "POLICY = @own.small()\nown.smaller.layers = 2",
        "tests.own.smaller.layers",
    ),
    "a section that its own file takes out again": (
        WIRED + "configs.Experiment.cold_start = None",
        "configs.Supervised.steps",
    ),
}


@pytest.mark.parametrize("later", [(), (OTHER,), (OTHER, "configs.Experiment.init_from = ''")])
@pytest.mark.parametrize("case", UNREAD)
def test_an_unread_binding_is_refused_whatever_comes_later(load, case, later):
    text, name = UNREAD[case]
    with pytest.raises(ValueError, match=rf"^{name} is bound but nothing uses it; bind @"):
        load(text, *later)
    with pytest.raises(ValueError, match=rf"^{name} is bound but nothing uses it; bind @"):
        load(text, *later, bindings=["configs.Experiment.seed = 2"])


MODEL = """
POLICY = @own.small()
configs.Experiment.model = %POLICY
LAYERS = 2
own.small.layers = %LAYERS
"""
NESTED = """
configs.Experiment.reinforcement = @configs.Reinforcement()
configs.Reinforcement.optimizer = @run/rl/configs.Optimizer()
configs.Optimizer.eps = 1e-6
run/configs.Optimizer.b1 = 0.5
run/rl/configs.Optimizer.b2 = 0.6
"""
ORPHANED = {
    "a section": (WIRED, "configs.Experiment.cold_start = None"),
    "a scope": (WIRED, "configs.Reinforcement.optimizer = @slow/configs.Optimizer()"),
    "all of nested scopes": (NESTED, "configs.Reinforcement.optimizer = @configs.Optimizer()"),
    "the inner of nested scopes": (
        NESTED,
        "configs.Reinforcement.optimizer = @run/configs.Optimizer()",
    ),
    "a section with a section in it": (
        WIRED,
        "configs.Experiment.reinforcement = @other/configs.Reinforcement()\n"
        "other/configs.Reinforcement.optimizer = @configs.Optimizer()",
    ),
    "an outer scope": (
        "configs.Experiment.reinforcement = @configs.Reinforcement()\n"
        "configs.Reinforcement.optimizer = @run/rl/configs.Optimizer()\n"
        "run/configs.Optimizer.b1 = 0.5",
        "run/rl/configs.Optimizer.b1 = 0.6",
    ),
    "options of a loss": (
        "configs.Experiment.reinforcement = @configs.Reinforcement()\n"
        "configs.Reinforcement.objective = @configs.Objective()\n"
        "configs.Objective.loss = @objectives.gspo\nobjectives.gspo.clip_low = 1e-3",
        "configs.Objective.loss = @objectives.minirl",
    ),
    "what a macro names": (MODEL, "POLICY = @own.smaller()"),
    "a macro": (MODEL, "configs.Experiment.model = @own.smaller()"),
    "a value that was a macro": (MODEL, "own.small.layers = 1"),
    "an item of a list": (
        "configs.Experiment.reinforcement = @configs.Reinforcement()\n"
        "configs.Reinforcement.objective = @configs.Objective()\n"
        "from jaxrl_stable import corrections\n"
        "configs.Objective.loss = @objectives.reinforce\n"
        "configs.Objective.corrections = [@corrections.token_tis]\n"
        "corrections.token_tis.cap = 3.0",
        "configs.Objective.corrections = []",
    ),
}


@pytest.mark.parametrize("case", ORPHANED)
def test_a_binding_may_be_orphaned_by_a_later_file_or_the_command_line(load, case):
    text, later = ORPHANED[case]
    before = load(text)
    assert load(text, OTHER, later) != before
    by_file = load(text, later)
    assert by_file != before
    assert load(text, bindings=[IMPORT, *later.splitlines()]) == by_file
    assert load(text, OTHER, bindings=[IMPORT, *later.splitlines()]).seed == 1


def test_only_bindings_of_what_was_replaced_may_be_left_over(load):
    """An orphan of one section does not excuse a typo in another."""
    with pytest.raises(ValueError, match=r"^lr/configs.Optimizer.b1 is bound"):
        load(WIRED + "lr/configs.Optimizer.b1 = 0.5", "configs.Experiment.cold_start = None")


def test_an_orphan_that_a_later_file_configures_is_refused(load):
    gone = "configs.Experiment.cold_start = None"
    with pytest.raises(ValueError, match=r"^configs.Supervised.length is bound"):
        load(WIRED, gone, "configs.Supervised.length = 64")
    with pytest.raises(ValueError, match=r"^configs.Supervised.length is bound"):
        load(WIRED, gone, bindings=["configs.Supervised.length = 64"])


def test_each_field_is_read_in_the_longest_scope_that_binds_it(load):
    optimizer = load(NESTED).reinforcement.optimizer
    assert (optimizer.eps, optimizer.b1, optimizer.b2) == (1e-6, 0.5, 0.6)


MACROS = """
LAYERS = 3
HELDOUT = "test.jsonl"
configs.Experiment.data = @configs.Data()
configs.Data.heldout = %HELDOUT
configs.Experiment.model = @own.small()
own.small.layers = %LAYERS
"""


@pytest.mark.parametrize(
    ("macro", "message"),
    [
        ("HELD_OUT='mine.jsonl'", r"the macro HELD_OUT is bound .* did you mean HELDOUT\?"),
        ("layer=2", r"the macro layer is bound .* did you mean LAYERS\?"),
        ("STEPS=2", r"the macro STEPS is bound .* the macros in use are HELDOUT, LAYERS$"),
    ],
)
def test_a_macro_that_nothing_reads(load, macro, message):
    """`--gin.HELD_OUT=…` for HELDOUT would evaluate on another file, in silence."""
    with pytest.raises(ValueError, match=message):
        load(MACROS, bindings=[macro])
    with pytest.raises(ValueError, match=message):
        load(MACROS + macro)


def test_macros_that_are_read(load):
    experiment = load(MACROS, bindings=["HELDOUT='mine.jsonl'", "LAYERS=2"])
    assert experiment.data.heldout == "mine.jsonl" and experiment.model.num_layers == 2
    assert load("A = 3\nB = %A\nconfigs.Experiment.seed = %B").seed == 3  # read through another


def test_a_macro_whose_reader_a_later_file_replaced(load):
    assert load(MACROS, "configs.Data.heldout = 'mine.jsonl'").data.heldout == "mine.jsonl"
    with pytest.raises(ValueError, match="the macro HELDOUT is bound but nothing uses it"):
        load(MACROS, bindings=["configs.Data.heldout='mine.jsonl'", "HELDOUT='other.jsonl'"])


def test_a_macro_without_any_in_use(load):
    with pytest.raises(ValueError, match=r"macro UNUSED .*these gin files use no macros"):
        load("UNUSED = 3")


@pytest.mark.fast
def test_what_a_file_between_referred_to_may_be_orphaned_by_a_later_one(tmp_path):
    files = {
        "base": "objectives.gspo.clip_low = 1e-3",
        "middle": "configs.Objective.loss = @objectives.gspo",
        "top": "configs.Objective.loss = @objectives.cispo",
    }
    paths = [str(pathlib.Path(__file__).with_name("experiment.gin"))]  # wires the objective in
    for name, line in files.items():
        paths.append(str(tmp_path / f"{name}.gin"))
        pathlib.Path(paths[-1]).write_text(
            "from __gin__ import dynamic_registration\nfrom jaxrl_stable import configs\n"
            f"from jaxrl_stable import objectives\n{line}\n"
        )
    assert load_experiment(paths).reinforcement.objective.loss is cispo
    with pytest.raises(ValueError, match=r"objectives\.gspo\.clip_low is bound but nothing"):
        load_experiment(paths[:2])


@pytest.mark.fast
def test_a_reference_without_a_scope_is_called_in_that_of_its_caller(tmp_path):
    head = "from __gin__ import dynamic_registration\nfrom jaxrl_stable import configs\n"
    scoped, plain = tmp_path / "scoped.gin", tmp_path / "plain.gin"
    scoped.write_text(
        f"{head}configs.Experiment.reinforcement = @own/configs.Reinforcement()\n"
        "own/configs.Reinforcement.optimizer = @configs.Optimizer()\n"
        "own/configs.Optimizer.learning_rate = 0.125\n"
    )
    assert load_experiment([str(scoped)]).reinforcement.optimizer.learning_rate == 0.125
    plain.write_text(f"{head}configs.Experiment.reinforcement = @configs.Reinforcement()\n")
    assert load_experiment([str(scoped), str(plain)]).reinforcement.optimizer.learning_rate == 1e-6
