"""What the programs share: flags, gin, and errors in one line.

    python -m jaxrl_stable.train --gin_file=experiments/quickstart.gin --workdir=runs/quickstart \
        --gin.configs.Experiment.seed=1
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import gin
import jax
from absl import app, flags, logging

from jaxrl_stable import configs, distributed, watch
from jaxrl_stable.describe import describe

T = TypeVar("T")

GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], "gin files of the experiment; later ones override earlier ones"
)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of this run; resumed when it has one")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would run, and stop")
DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of an error")

GIN_PREFIX = "--gin."

# Bindings on the command line know these names, whatever the gin files import.
PREAMBLE = (
    "from __gin__ import dynamic_registration",
    "from jaxrl_stable import advantages",
    "from jaxrl_stable import array_tasks",
    "from jaxrl_stable import configs",
    "from jaxrl_stable import corrections",
    "from jaxrl_stable import data",
    "from jaxrl_stable import hf",
    "from jaxrl_stable import objectives",
    "from jaxrl_stable.model import config as model",
    "from jaxrl_stable.study import config as study",
)

# A function that gin is to configure has to be bound by reference, also where it is the default.
DEFAULTS = (
    "configs.Objective.loss = @objectives.minirl",
    "configs.Objective.advantages = @advantages.centered",
)

FUNCTIONS = ("advantages", "corrections", "objectives")  # modules whose functions gin passes on

_default_values: list[object] = []  # what they bound when gin last read files

GIN_ERRORS = (ValueError, TypeError, SyntaxError, NameError, ImportError, AttributeError)


class Kind(NamedTuple):
    """What a program reads from gin.

    Attributes:
      build: makes it, once gin has parsed everything.
      describe: what a dry run prints of it.
      default_workdir: where it is kept if nobody says, given the gin files; None asks.
    """

    build: Callable[[], Any]
    describe: Callable[[Any], str]
    default_workdir: Callable[[Sequence[str]], str] | None = None


def run(main: Callable[[Any, str], None], kind: Kind | None = None) -> None:
    """Parses flags and gin, then calls `main(experiment, workdir)`.

    `--gin.NAME=VALUE` binds NAME after all files, as in t5x. What a user can mend (a wrong name, a
    missing file, a bad record) ends as one line on stderr and exit status 2. The processes of a
    run find each other first (`distributed`), and end together (`watch`).

    Args:
      main: the program.
      kind: of what it runs; an `Experiment` by default.
    """
    kind = kind or Kind(build_experiment, describe)
    bindings = [arg.removeprefix(GIN_PREFIX) for arg in sys.argv[1:] if arg.startswith(GIN_PREFIX)]
    argv = [arg for arg in sys.argv if not arg.startswith(GIN_PREFIX)]

    def start(_: Sequence[str]) -> None:
        with errors_in_one_line(DEBUG.value):
            workdir = WORKDIR.value
            if workdir is None and kind.default_workdir:
                workdir = kind.default_workdir(GIN_FILE.value)
            if workdir is None:
                raise ValueError("--workdir is missing; say where this run keeps its files")
            if not DRY_RUN.value:
                distributed.initialize()
        with watch.together(), errors_in_one_line(DEBUG.value):
            if jax.config.jax_compilation_cache_dir is None:  # a resumed run need not compile
                cache = os.path.join(os.path.abspath(workdir), "xla_cache")
                jax.config.update("jax_compilation_cache_dir", cache)
            experiment = load(GIN_FILE.value, bindings, kind.build)
            if DRY_RUN.value:
                print(resolved_config(), kind.describe(experiment), sep="\n")
                return
            distributed.check_shared(workdir)
            main(experiment, workdir)

    app.run(start, argv)


@contextlib.contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """What a user can mend ends the program as one line on stderr and exit status 2."""
    _quiet_libraries()
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if debug:
            raise
        message = _one_line(error)
        if watch.report(message):
            print(f"error: {message} (--debug shows where)", file=sys.stderr)
        sys.exit(2)


def load_experiment(files: Sequence[str], bindings: Sequence[str] = ()) -> configs.Experiment:
    """Reads gin files and bindings into an `Experiment`; raises what `load` does."""
    return load(files, bindings, build_experiment)


def load(files: Sequence[str], bindings: Sequence[str], build: Callable[[], T]) -> T:
    """Reads gin files and bindings, and builds what they describe.

    Args:
      files: later ones override earlier ones.
      bindings: lines that override all files.
      build: makes the object of what gin has parsed.

    Raises:
      ValueError: a name, field or value that gin or a config does not accept.
      FileNotFoundError: a gin file is missing.
    """
    for path in files:
        if not os.path.exists(path):
            raise FileNotFoundError(f"gin file {path} does not exist; check --gin_file")
    # What a file configures may be orphaned by a later one or by the command line: that is their
    # purpose. So a binding has to be read with the files up to its own, or with all there is.
    read = set()
    for last in range(1, len(files) + 1):
        try:
            _parse(files[:last], (), build)
            read |= _read_bindings()
        except (ValueError, OSError):  # files that need more to be complete
            continue
    built = _parse(files, bindings, build)
    for scope, selector, name in sorted(_bindings() - read - _read_bindings()):
        cls = f"{scope}/" * bool(scope) + selector.removeprefix("jaxrl_stable.")
        call = "" if cls.split(".")[0] in FUNCTIONS else "()"
        raise ValueError(
            f"{cls}.{name} is bound but nothing uses it; bind @{cls}{call} where it "
            "belongs, name the scope that is used, or remove the line"
        )
    return built


def resolved_config() -> str:
    """Every binding that was used, as gin text: what ran, defaults included."""
    return gin.operative_config_str()


def build_experiment() -> configs.Experiment:
    """The experiment that gin has parsed."""
    experiment = configured(configs.Experiment)()
    rl = experiment.reinforcement
    rl.resolved_objective.try_functions()  # through gin, which notes what they read
    rl = dataclasses.replace(rl, objective=_settled(rl.objective))
    rl.resolved_objective.check()
    return dataclasses.replace(experiment, reinforcement=rl)


def _parse(files: Sequence[str], bindings: Sequence[str], build: Callable[[], T]) -> T:
    """Parses and builds; whatever gin or a config objects to is a ValueError of one line."""
    gin.clear_config()
    try:
        gin.parse_config([*PREAMBLE, *DEFAULTS])
        _default_values[:] = [v for values in gin.config._CONFIG.values() for v in values.values()]
        gin.parse_config_files_and_bindings(list(files), [*PREAMBLE, *bindings])
        return build()
    except GIN_ERRORS as error:
        raise ValueError(_one_line(error)) from error


def _settled(objective: configs.Objective) -> configs.Objective:
    """The objective with its functions as they are bound now."""
    return dataclasses.replace(
        objective,
        loss=settled(objective.loss),
        advantages=settled(objective.advantages),
        corrections=tuple(map(settled, objective.corrections)),
    )


def settled(function: Callable) -> Callable:
    """A function of an objective with the options that are bound now, whatever gin reads later.

    Raises:
      ValueError: a function under a scope.
    """
    original = inspect.unwrap(function)
    if original is function:
        return function
    if function is not gin.get_configurable(original):
        raise ValueError(
            f"@…/{original.__name__} has a scope, which the functions of an Objective do not "
            "take; bind it without one"
        )
    options = gin.get_bindings(original)
    return functools.partial(original, **options) if options else original


def configured(cls: type) -> Callable:
    """The class as gin configures it; itself when no gin file mentions it."""
    try:
        return gin.get_configurable(cls)
    except ValueError:
        return cls


Binding = tuple[str, str, str]  # scope, selector, name


def _bindings() -> set[Binding]:
    """All but macros and what `DEFAULTS` bound."""
    return {
        (scope, selector, name)
        for (scope, selector), values in gin.config._CONFIG.items()
        for name, value in values.items()
        if selector != "gin.macro" and not any(value is default for default in _default_values)
    }


def _read_bindings() -> set[Binding]:
    """Bindings that something reads; the others are mistakes that would pass in silence.

    gin has no public view of single bindings; these two tables are what `gin.config_str` and
    `gin.operative_config_str` print. A use in scope "a/b" takes the value of the longest of "a/b",
    "a" and "" that binds the name.
    """
    bound = _bindings()
    read = set()
    for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items():
        parts = scope.split("/") if scope else []
        for name in values:
            for length in range(len(parts), -1, -1):
                candidate = ("/".join(parts[:length]), selector, name)
                if candidate in bound:
                    read.add(candidate)
                    break
    return read


def _one_line(error: Exception) -> str:
    """The message, without gin's note of the function that it came through."""
    return re.sub(r" In call to configurable .*$", "", " ".join(str(error).split()))


def _quiet_libraries() -> None:
    """Keeps the console for the run: jax, orbax and grain log each of their steps."""
    logging.set_verbosity(logging.WARNING)
