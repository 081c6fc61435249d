"""Converts Hugging Face checkpoints from the command line.

    python -m jaxrl_stable.hf inspect MODEL
    python -m jaxrl_stable.hf import MODEL WORKDIR
    python -m jaxrl_stable.hf export WORKDIR MODEL --like=ORIGINAL
    python -m jaxrl_stable.hf upcycle DENSE MODEL --copies=8 --chosen=2

MODEL is a model directory as written by transformers; WORKDIR is a run's working directory. All
commands work in host memory. For models that do not fit there, set `Experiment.init_from`: a run
then loads the checkpoint directly into shards.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import sys
from collections.abc import Sequence

import jax

from jaxrl_stable import hf
from jaxrl_stable.checkpoint import Checkpointer, load_model, stored_architecture
from jaxrl_stable.configs import MeshShape
from jaxrl_stable.hf.files import DTYPES, TensorFiles
from jaxrl_stable.hf.load import plan_of
from jaxrl_stable.hf.names import LAYOUTS
from jaxrl_stable.hf.save import companions, copy_companions
from jaxrl_stable.hf.tied import check_copy
from jaxrl_stable.model import ModelConfig, init_model, parameter_count
from jaxrl_stable.program import errors_in_one_line
from jaxrl_stable.sharding import abstract_state, make_mesh
from jaxrl_stable.text import OneLineParser

_TYPES = tuple(dtype.name for dtype in DTYPES.values())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses one of the four commands and its options."""
    parser = OneLineParser(
        prog="python -m jaxrl_stable.hf", description="Converts Hugging Face checkpoints."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="check a checkpoint and describe it")
    command.add_argument("model")

    command = commands.add_parser("import", help="turn a checkpoint into the start of a run")
    command.add_argument("model")
    command.add_argument("workdir")
    command.add_argument("--param_dtype", choices=_TYPES, default="float32")

    command = commands.add_parser("export", help="write a run's weights for transformers")
    command.add_argument("workdir")
    command.add_argument("model")
    command.add_argument("--like", default=None, help="checkpoint that the run started from")
    command.add_argument("--best", action="store_true", help="the best checkpoint, not the newest")
    command.add_argument("--dtype", choices=_TYPES, default="bfloat16")
    command.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])

    command = commands.add_parser("upcycle", help="make a dense checkpoint sparse")
    command.add_argument("dense")
    command.add_argument("model")
    command.add_argument("--copies", type=int, required=True, help="number of copies of each MLP")
    command.add_argument("--chosen", type=int, default=1, help="number of copies used per token")
    command.add_argument("--segments", type=int, default=1, help="number of experts per copy")
    command.add_argument("--noise", type=float, default=0.0, help="relative noise on the copies")
    command.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def inspect(arguments: argparse.Namespace) -> None:
    """Checks the tensors of a checkpoint against its config and prints a summary."""
    directory = pathlib.Path(arguments.model)
    config = hf.read_config(directory)
    files = TensorFiles(directory)
    plan_of(files, config, jax.eval_shape(lambda: init_model(config, 0)))
    check_copy(files, config)
    stored = collections.Counter()
    for name, shape in files.shapes.items():
        stored[files.codes[name]] += math.prod(shape)
    for name, value in config.architecture().items():
        print(f"{name:24s}{value}")
    types = ", ".join(f"{count:,} in {code}" for code, count in stored.items())
    print(f"{'parameters':24s}{parameter_count(config):,}")
    print(f"{'stored':24s}{len(files.shapes):,} tensors; {types}")
    others = [file.name for file in companions(directory)]
    print(f"{'other files':24s}{', '.join(others) or 'none'}")


def import_(arguments: argparse.Namespace) -> None:
    """Saves a Hugging Face checkpoint as step 0 of a run, from which other runs can start."""
    workdir = pathlib.Path(arguments.workdir)
    checkpoints = workdir / "checkpoints"
    if checkpoints.exists():
        raise ValueError(f"{checkpoints} already exists; use a new working directory")
    config = hf.read_config(arguments.model, param_dtype=arguments.param_dtype)
    model = hf.load(arguments.model, make_mesh(MeshShape()), config)
    with Checkpointer(checkpoints, config.architecture()) as checkpointer:
        checkpointer.save(0, {"model": model})
    copy_companions(arguments.model, workdir)
    print(f"wrote {checkpoints}; start from it with configs.Experiment.init_from = '{workdir}'")


def export(arguments: argparse.Namespace) -> None:
    """Restores a run's weights and saves them for transformers."""
    checkpoints = pathlib.Path(arguments.workdir) / "checkpoints"
    architecture = stored_architecture(checkpoints)
    config = ModelConfig.from_architecture(architecture)
    template = abstract_state(make_mesh(MeshShape()), lambda: init_model(config, 0))
    model = load_model(checkpoints, config.architecture(), template, best=arguments.best)
    hf.save(
        model,
        arguments.model,
        dtype=arguments.dtype,
        layout=arguments.layout,
        like=arguments.like,
    )
    if arguments.like is None:
        copy_companions(arguments.workdir, pathlib.Path(arguments.model))
    print(f"wrote {arguments.model}")


def upcycle_(arguments: argparse.Namespace) -> None:
    """Writes a mixture-of-experts checkpoint made from a dense one."""
    options = {
        name: getattr(arguments, name) for name in ("copies", "chosen", "segments", "noise", "seed")
    }
    hf.upcycle(arguments.dense, arguments.model, **options)
    print(f"wrote {arguments.model}")


def main(arguments: argparse.Namespace) -> None:
    commands = {"inspect": inspect, "import": import_, "export": export, "upcycle": upcycle_}
    jax.config.update("jax_platforms", "cpu")
    with errors_in_one_line(arguments.debug):
        commands[arguments.command](arguments)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
