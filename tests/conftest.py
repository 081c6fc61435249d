"""Shared small models and batches; anything that compiles is made once per session."""

import dataclasses
import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Callable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the suite. Without LLVM's optimizations and the MLIR pipeline of the fusion
# emitters it takes a sixth of the time; the HLO passes are the same. jaxlib exits at an unknown
# flag, as 0.12.0.1 does at the second one.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11."))
    else "--xla_backend_optimization_level=0",
)
# Compiled programs, shared by all processes, runs and clones of this user.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxrl_stable", "xla"
    ),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_stable import configs
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.sampler.quantize import quantize
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.optimizer import init_state, make_optimizer
from jaxrl_stable.trainer.score import score, with_old_policy
from jaxrl_stable.trainer.update import update

OBJECTIVE = configs.Objective()
MANY_MAPS = 30_000
ROWS, WIDTH, MAX_TOKENS, EOS = 16, 7, 9, 2

# Tracing makes many long-lived objects: collecting less often saves a fifth of its time.
gc.set_threshold(100_000, 50, 100)


# Files that take longest. pytest-xdist hands out files by their number of tests, so these, which
# have few, would come last, and one worker would end minutes after the other.
LONGEST = (
    "test_notebooks",
    "test_train",
    "test_processes",
    "test_runner",
    "test_runs",
    "test_meshes",
    "test_update",
)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist keeps the order of collection
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees compiled programs before there are too many.

    Every program holds memory maps, and Linux gives a process 65,530 of them: beyond that XLA
    aborts, in whichever test happens to compile next.
    """
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def config():
    """Two MoE layers behind a dense one: routing must be aligned by MoE layer, not by depth."""
    return tiny(
        vocab_size=32,
        hidden_size=32,
        num_layers=3,
        mlp_only_layers=(0,),
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        head_chunk=16,
    )


@pytest.fixture(scope="session")
def model(config):
    return init_model(config, 0)


@pytest.fixture(scope="session")
def prompts():
    """Left-padded prompts of different lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, WIDTH + 1, ROWS)
    mask = np.arange(WIDTH)[None] >= WIDTH - lengths[:, None]
    return np.where(mask, rng.integers(4, 32, (ROWS, WIDTH)), 0), mask


@pytest.fixture(scope="session")
def sample(prompts):
    """The jitted rollout: `sample(model, key)`."""
    sampling = Sampling(MAX_TOKENS, stop_ids=(EOS, 3, 4))
    jitted = jax.jit(partial(rollout, sampling=sampling))
    return lambda model, key: jitted(model, *prompts, key)


@pytest.fixture(scope="session")
def trajectory(model, sample):
    """A rollout sampled by the policy itself."""
    return sample(model, jax.random.key(1))


@pytest.fixture(scope="session")
def quantized_trajectory(model, sample):
    """A rollout sampled by the int8 copy: a real gap between sampler and trainer."""
    return sample(quantize(model, "int8"), jax.random.key(1))


@pytest.fixture(scope="session")
def advantages():
    rewards = np.random.default_rng(3).integers(0, 2, ROWS).astype(np.float32)
    return jnp.asarray(rewards - rewards.mean())


@dataclasses.dataclass(frozen=True)
class Passes:
    """Jitted `score` and `update`, compiled once per setting."""

    optimizer: optax.GradientTransformation
    score: Callable
    update: Callable

    def init(self, model):
        return init_state(model, self.optimizer)

    def scored(self, model, trajectory, advantages, replay="R3", micro_batch_size=4):
        batch = make_batch(trajectory, advantages)
        return self.score(
            model, batch, replay=replay, micro_batch_size=micro_batch_size, temperature=1.0
        )

    def scored_batch(self, model, trajectory, advantages, replay="R3", micro_batch_size=4):
        scored = self.scored(model, trajectory, advantages, replay, micro_batch_size)
        return with_old_policy(make_batch(trajectory, advantages), scored)

    def step(self, state, batch, objective=OBJECTIVE, micro_batch_size=4):
        return self.update(
            state, batch, objective=objective, micro_batch_size=micro_batch_size, temperature=1.0
        )


@pytest.fixture(scope="session")
def passes():
    optimizer = make_optimizer(configs.Optimizer(learning_rate=1e-2, clip_norm=1e9))
    return Passes(
        optimizer,
        jax.jit(score, static_argnames=("replay", "micro_batch_size", "temperature")),
        jax.jit(
            partial(update, optimizer=optimizer),
            static_argnames=("objective", "micro_batch_size", "temperature"),
        ),
    )


@pytest.fixture(scope="session")
def perturbed(model):
    """The policy after some updates: every weight moved by a few percent."""
    leaves, treedef = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [w * (1 + 0.05 * jax.random.normal(k, w.shape)) for w, k in zip(leaves, keys)]
    return jax.tree.unflatten(treedef, moved)
