"""The examples learn, and their losses agree with the formula."""

import ast
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from tests.integrations.outside import EXAMPLES, example, minirl_loss

# How to find the policy, as a function of tokens, among the arguments of a module's `update`.
POLICY = {
    "plain_jax": lambda module, params, *_: partial(module.policy, params),
    "flax_nnx": lambda module, model, *_: model,
    "equinox_module": lambda module, model, *_: model,
}


@pytest.mark.parametrize(
    "name", sorted(POLICY.keys() - {"plain_jax"})
)  # which runs as a script below
def test_the_reward_rises(name):
    losses, rewards = np.transpose(list(example(name).train(steps=9)))
    assert np.isfinite(losses).all()
    assert rewards[0] < 0.15 and rewards[-1] > 0.4, rewards


@pytest.mark.parametrize("name", POLICY)
def test_the_loss_is_that_of_the_formula(name, monkeypatch):
    """Records every mini-batch of two rollouts, so that all three policies differ."""
    module, plain = example(name), example("plain_jax")
    update, seen = module.update, []

    def recorded(*arguments):
        batch = arguments[-1]
        logits_of = POLICY[name](module, *arguments)
        logp = np.asarray(plain.score(logits_of, batch["prompts"], batch["tokens"]))
        arrays = {key: np.asarray(batch[key]) for key in batch}
        others = (arrays[key] for key in ("logp_old", "logp_rollout", "advantages", "mask"))
        expected = minirl_loss(logp, *others)
        mismatch = np.where(arrays["mask"], arrays["logp_old"] - arrays["logp_rollout"], 0)
        staleness = np.where(arrays["mask"], logp - arrays["logp_old"], 0)
        result = update(*arguments)
        loss = result[-1] if isinstance(result, tuple) else result
        seen.append((float(loss), expected, np.abs(mismatch).max(), np.abs(staleness).max()))
        return result

    monkeypatch.setattr(module, "update", recorded)
    list(module.train(steps=2))
    losses, expected, mismatch, staleness = np.transpose(seen)
    assert len(losses) == 2 * plain.MINI_BATCHES
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    assert (mismatch > 1e-4).all()  # the sampler is a bfloat16 copy
    assert (staleness[1 : plain.MINI_BATCHES] > 1e-2).all()


def test_plain_jax_imports_nothing_else():
    nodes = list(ast.walk(ast.parse((EXAMPLES / "plain_jax.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {"jaxrl_stable.advantages", "jaxrl_stable.objectives"}
    assert names == ours | {"functools", "jax", "jax.numpy", "numpy", "optax"}


def run(*command, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parents[1]), *sys.path])
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, **options
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_example_runs_as_a_script():
    lines = run(str(EXAMPLES / "plain_jax.py")).splitlines()
    matches = [re.fullmatch(r"step +(\d+) +loss +(\S+) +reward (\S+)", line) for line in lines]
    assert [int(match[1]) for match in matches] == list(range(20))
    assert float(matches[0][3]) < 0.2 and float(matches[-1][3]) > 0.9


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from functools import partial
import numpy as np
from plain_jax import collect, init, sample
from sharded_loss import aggregate, divide, loss_and_gradient, total_of

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
params, moved = init(jax.random.key(0)), init(jax.random.key(3))
batch, _ = collect(partial(sample, params), np.random.default_rng(0), jax.random.key(1))
batch = {name: np.array(array) for name, array in batch.items()}
batch["mask"][:24, 1:] = False  # one device gets short rows
batch["mask"][30:40] = False  # rows without a response
for mode, micro_batches in (("seq-mean-token-sum", 3), ("token-mean", 1)):
    whole = lambda params: (lambda t, c: divide(t, c))(*total_of(params, batch, mode))
    expected = jax.jit(jax.value_and_grad(whole))(moved)
    mine = loss_and_gradient(mesh, mode, micro_batches)(moved, batch)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, mine, expected)
    quarters = [{n: a[i : i + 24] for n, a in batch.items()} for i in range(0, 96, 24)]
    mean_of_means = np.mean([divide(*total_of(moved, part, mode)) for part in quarters])
    assert abs(mean_of_means - expected[0]) > 0.01 * abs(expected[0]), (mean_of_means, expected[0])
print("the same loss")
"""


def test_sharded_loss_is_the_loss_of_the_whole_batch():
    assert run("-c", SHARDED).strip() == "the same loss"


def test_the_table_lists_the_examples():
    readme = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"\]\((\w+\.py)\)", readme))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}
