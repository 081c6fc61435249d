"""The programs of a run, compiled for devices that this machine does not have.

These are the programs from `run.programs.make_programs`, with the same buffer donation. Each takes
the outputs of the previous one, so the results hold for real runs. Arguments are shapes with
shardings; nothing is allocated.

Every response is assumed to have full length. The programs have fixed shapes, so a shorter response
only changes how often the decode loop runs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_stable.aot.flops import forward_flops
from jaxrl_stable.configs import Experiment, Reinforcement
from jaxrl_stable.model.attention import attention_implementation
from jaxrl_stable.model.dispatch import experts_implementation
from jaxrl_stable.model.transformer import init_model
from jaxrl_stable.routing import Routing
from jaxrl_stable.run.programs import make_programs
from jaxrl_stable.sampler.rollout import Sampling
from jaxrl_stable.sharding import ROWS, abstract_state
from jaxrl_stable.trainer.batch import TrainBatch, make_batch
from jaxrl_stable.trainer.optimizer import TrainState, init_state, make_optimizer
from jaxrl_stable.trainer.score import with_old_policy
from jaxrl_stable.trajectory import Trajectory

NAMES = ("rollout", "score", "update")  # the small programs between them are compiled too

# A program that does not fit is a result here, not an error: without this flag libtpu refuses to
# compile and reports only two numbers.
OPTIONS = {"xla_tpu_no_crash_on_oom": "true"}


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program and its abstract arguments.

    Attributes:
      name: name in `run.programs.Programs`.
      function: the jitted function.
      arguments: arguments by name, in order: shapes with shardings.
      resident: arrays that the run also holds on its chips while the program runs, by name.
      model_flops: FLOPs that the model needs on all chips together, outside loops of unknown
        length.
      loop_flops: like `model_flops`, for one iteration of such a loop (one token for every row in
        the cache).
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    resident: dict[str, Any]
    model_flops: float
    loop_flops: float = 0.0

    def compile(self) -> Compiled:
        """Compiles the program; the mesh of the arguments must be in use (`jax.set_mesh`)."""
        begin = time.perf_counter()
        lowered = self.function.lower(*self.arguments.values())
        executable = lowered.compile(compiler_options=OPTIONS)
        shapes = jax.eval_shape(self.function, *self.arguments.values())
        outputs = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            executable.output_shardings,
        )
        return Compiled(self, executable, outputs, time.perf_counter() - begin)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      program: the program before compilation.
      executable: the compiled program.
      outputs: its results as shapes, with the shardings that the compiler chose.
      seconds: time for tracing, lowering and compiling.
    """

    program: Program
    executable: jax.stages.Compiled
    outputs: Any
    seconds: float


def compiled_programs(
    experiment: Experiment, mesh: Mesh, names: tuple[str, ...] = NAMES
) -> Iterator[Compiled]:
    """Compiles the programs of one training step, in the order in which they run.

    Args:
      experiment: the experiment.
      mesh: the mesh over the devices to compile for; must be in use (`jax.set_mesh`).
      names: some of `NAMES`; the programs that produce their arguments are compiled too.

    Raises:
      ValueError: if a name is unknown, or rows do not divide evenly over the mesh.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"--programs={name} is unknown; use some of {', '.join(NAMES)}")
    config, rl = experiment.model, experiment.reinforcement
    rows, width = rl.prompts * rl.group_size, experiment.data.prompt_width
    columns, parts = width + rl.max_tokens, rl.objective.mini_batches
    programs = make_programs(rl, _sampling(rl, config.vocab_size))
    state = abstract_train_state(experiment, mesh)
    held = {"optimizer": state.opt_state}
    if rl.objective.kl_coefficient:
        held["reference"] = state.model

    sampler = state.model
    if "rollout" in names:
        arguments = {"model": state.model}
        quantized = Program("quantize", programs.quantize, arguments, held, 0.0).compile()
        sampler = quantized.outputs
        yield quantized
    prompts = {
        "sampler": sampler,
        "prompts": _rows(mesh, (rows, width), jnp.int32),
        "prompt_mask": _rows(mesh, (rows, width), bool),
        "key": abstract_state(mesh, lambda: jax.random.key(0)),
    }
    trajectory = abstract_trajectory(mesh, programs.rollout, prompts)
    if "rollout" in names:
        same = _layout(sampler) == _layout(state.model)  # `quantize` copied nothing
        rollout = Program(
            "rollout",
            programs.rollout,
            prompts,
            held if same else held | {"model": state.model},
            model_flops=forward_flops(config, rows, width, scored=1),
            loop_flops=forward_flops(
                config, rl.rollout_rows or rows, 1, 1, past=width + rl.max_tokens // 2
            ),
        ).compile()
        trajectory = rollout.outputs
        yield rollout

    batch = make_batch(trajectory, _rows(mesh, (rows,), jnp.float32))
    if rl.objective.needs_score:
        scored = None
        if "score" in names:
            scored = Program(
                "score",
                programs.score,
                {"model": state.model, "batch": batch},
                held,
                model_flops=forward_flops(config, rows, columns, rl.max_tokens),
            ).compile()
            yield scored
            scored = scored.outputs
        else:
            scored = jax.eval_shape(programs.score, state.model, batch)
            scored = scored._replace(
                logp_old=_rows(mesh, (rows, columns), jnp.float32), routing=batch.routing
            )
        batch = with_old_policy(batch, scored)
    if rl.objective.kl_coefficient:
        logp = _rows(mesh, (rows, columns), jnp.float32)
        batch = dataclasses.replace(batch, logp_reference=logp)

    if "update" in names:
        resident = held | {"model": state.model}
        split = Program("split", programs.split, {"batch": batch}, resident, 0.0).compile()
        yield split
        first: TrainBatch = split.outputs[0]
        yield Program(
            "update",
            programs.update,
            {"state": state, "mini_batch": first},
            {name: held[name] for name in held if name != "optimizer"}
            | {"rollout": batch, "other mini-batches": split.outputs[1:]},
            model_flops=3 * forward_flops(config, rows // parts, columns, rl.max_tokens),
        ).compile()


def for_tpu(experiment: Experiment) -> Experiment:
    """Resolves "auto" as on a TPU; otherwise it would follow this machine's backend."""
    model = experiment.model
    implementations = dict(
        attention=attention_implementation(model, "tpu"),
        experts=experts_implementation(model, "tpu"),
    )
    return dataclasses.replace(experiment, model=dataclasses.replace(model, **implementations))


def abstract_train_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Returns weights and moments as shapes with shardings: the template for checkpoints."""
    optimizer = make_optimizer(experiment.reinforcement.optimizer)
    return abstract_state(mesh, lambda: init_state(init_model(experiment.model, 0), optimizer))


def abstract_trajectory(
    mesh: Mesh, rollout: Callable[..., Trajectory], prompts: dict[str, Any]
) -> Trajectory:
    """Returns a rollout as shapes; like the prompts, its rows are spread over all devices."""
    shapes: Trajectory = jax.eval_shape(rollout, *prompts.values())
    experts, valid = shapes.routing.experts, shapes.routing.valid
    by_row = jax.tree.map(
        lambda x: _rows(mesh, x.shape, x.dtype), dataclasses.replace(shapes, routing=valid)
    )
    spread = jax.ShapeDtypeStruct(
        experts.shape, experts.dtype, sharding=NamedSharding(mesh, P(None, ROWS))
    )
    return dataclasses.replace(by_row, routing=Routing(spread, by_row.routing))


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(ROWS)))


def _layout(tree: Any) -> list[tuple]:
    return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]


def _sampling(rl: Reinforcement, vocab_size: int) -> Sampling:
    """Returns the run's sampling settings; the stop token is a placeholder without effect."""
    last = vocab_size - 1
    return Sampling(rl.max_tokens, rl.temperature, rl.top_k, rl.top_p, (last,), last)
