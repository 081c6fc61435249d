"""Common entry point of all programs: flags, one-line errors, multi-process start-up.

    python -m jaxrl_stable.train --gin_file=experiments/quickstart.gin --workdir=runs/quickstart \
        --gin.configs.Experiment.seed=1
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

from jaxrl_stable import _moved, distributed, gin_files
from jaxrl_stable.checks import local_path
from jaxrl_stable.distributed import watch
from jaxrl_stable.gin_files import build_experiment, load, one_line, resolved_config
from jaxrl_stable.hf.config import resuming
from jaxrl_stable.run.describe import describe
from jaxrl_stable.run.origin import model_of_run
from jaxrl_stable.run.rehearsal import rehearse
from jaxrl_stable.text import any_terminal

GIN_PREFIX = gin_files.FLAG


class Kind(NamedTuple):
    """How a program builds what it runs from gin.

    Attributes:
      build: builds it after gin has parsed all files.
      describe: returns the text that a dry run prints.
      check: checks, in a dry run, everything that a run would before its first step; None checks
        nothing more than `build`.
      default_workdir: returns the working directory for the given gin files if there is no
        `--workdir`; None makes the flag mandatory.
    """

    build: Callable[[], Any]
    describe: Callable[[Any], str]
    default_workdir: Callable[[Sequence[str]], str | None] | None = None
    check: Callable[[Any, str], None] | None = None


EXPERIMENT = Kind(build_experiment, describe, check=rehearse)


def define_flags() -> flags.FlagValues:
    """Defines the flags that all programs share, and returns all flags.

    They are defined when a program starts, not on import, so that importing this package never
    touches the flags of another program.
    """
    if "gin_file" not in flags.FLAGS:
        flags.DEFINE_multi_string(
            "gin_file", [], "gin files of the experiment; later ones override earlier ones"
        )
        flags.DEFINE_string("workdir", None, "directory of this run; an existing run is resumed")
        flags.DEFINE_bool("dry_run", False, "print what would run, check it, and stop")
        flags.DEFINE_bool("debug", False, "show the traceback of an error")
    return flags.FLAGS


def run(main: Callable[[Any, str], None], kind: Kind | None = None) -> None:
    """Parses flags and gin, then calls `main(experiment, workdir)`.

    `--gin.NAME=VALUE` binds NAME after all files, as in t5x. Errors that a user can fix (a wrong
    name, a missing file, a bad record) end the program with one line on stderr and exit status 2.
    The processes of a run find each other first (`distributed`) and end together (`watch`).

    Args:
      main: the program.
      kind: what it reads from gin; `EXPERIMENT` by default.
    """
    any_terminal()
    kind = kind or EXPERIMENT
    options = define_flags()
    bindings = [arg.removeprefix(GIN_PREFIX) for arg in sys.argv[1:] if arg.startswith(GIN_PREFIX)]
    argv = [arg for arg in sys.argv if not arg.startswith(GIN_PREFIX)]
    if {"--help", "-h", "--helpshort"} & set(argv[1:]):
        print(help_text(sys.modules[main.__module__], options))
        return

    def start(_: Sequence[str]) -> None:
        with errors_in_one_line(options.debug):
            workdir = options.workdir
            if workdir is None and kind.default_workdir:
                workdir = kind.default_workdir(options.gin_file)
            if workdir is None:
                raise ValueError("--workdir is missing; say where this run keeps its files")
            workdir = local_path("--workdir", workdir)
            files = [local_path("--gin_file", path) for path in options.gin_file]
            if not options.dry_run:
                distributed.initialize()
        with watch.together(), errors_in_one_line(options.debug):
            check_jax()
            if jax.config.jax_compilation_cache_dir is None and not options.dry_run:
                cache = os.path.join(os.path.abspath(workdir), "xla_cache")
                jax.config.update("jax_compilation_cache_dir", cache)  # for a resumed run
            with resuming(partial(model_of_run, pathlib.Path(workdir))):
                experiment = load(files, bindings, kind.build)
            if options.dry_run:
                print(resolved_config(), kind.describe(experiment), sep="\n", flush=True)
                if kind.check:
                    kind.check(experiment, workdir)
                return
            distributed.check_shared(workdir)
            main(experiment, workdir)

    app.run(start, argv)


def help_text(module: types.ModuleType, options: flags.FlagValues) -> str:
    """Returns the help of a program: its docstring, its flags, and how to bind gin values.

    absl's own `--help` looks for flags in the module that was run, where most are not defined, and
    exits with status 1.
    """
    lines = [(module.__doc__ or "").strip(), "", "flags:"]
    modules = module, sys.modules[__name__]
    for flag in [flag for each in modules for flag in options.get_flags_for_module(each)]:
        default = f" (default: {flag.default_as_str})" if flag.default else ""
        value = "" if flag.boolean else "=…"
        lines.append(f"  --{flag.name}{value}\n      {flag.help}{default}")
    lines.append(f"  {GIN_PREFIX}NAME=VALUE\n      binds a gin value after all gin files")
    return "\n".join(lines)


def check_jax() -> None:
    """Checks that jax finds devices and computes in the types that the programs are written for.

    Raises:
      ValueError: if 64-bit types are on: sizes and counters are 32-bit integers throughout.
      RuntimeError: if there is no device of the platforms in JAX_PLATFORMS.
    """
    if jax.config.jax_enable_x64:
        raise ValueError(
            "JAX_ENABLE_X64 is on, but the programs compute in float32 and bfloat16; unset it"
        )
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # for "cuda" jax has a bare assertion
        reason = one_line(error) or "no such device"
        raise RuntimeError(
            f"JAX_PLATFORMS is {jax.config.jax_platforms!r}, but jax cannot use it here: {reason}; "
            "unset it, or install jax for that device (pip install 'jaxrl_stable[cuda]' or '[tpu]')"
        ) from error


@contextlib.contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turns user-fixable errors into one line on stderr and exit status 2."""
    any_terminal()
    logging.set_verbosity(logging.WARNING)  # jax, orbax and grain log each of their steps
    try:
        yield
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if debug:
            raise
        message = one_line(error)
        if watch.report(message):
            print(f"error: {message} (--debug shows where)", file=sys.stderr)
        sys.exit(2)


__getattr__ = _moved.moved_names("jaxrl_stable.program")  # names that have moved
