"""Runs that are mapped together equal runs made alone with the library's own steps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.array_tasks import Reverse
from jaxrl_stable.configs import Reinforcement
from jaxrl_stable.objective import Objective
from jaxrl_stable.objectives import dppo, gspo, minirl, vespo
from jaxrl_stable.run.programs import make_programs
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.study.choice import Choice, program_of
from jaxrl_stable.study.runs import (
    advance,
    demonstrations,
    heldout_score,
    policy,
    reinforce,
    repeated,
)
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.optimizer import init_state, make_optimizer
from jaxrl_stable.trainer.score import with_old_policy

KEY = jax.random.key(0)


def leaves(tree):
    return [
        np.asarray(x)
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]


def test_runs_together_are_runs_alone(study, together):
    """Four objectives, two seeds, two cold starts: each run equals the same run made alone."""
    wave, runs, program = together
    ended, curves = program(runs, jnp.int32(0))
    cells = study.cells()
    objectives = tuple(cells[name].objective for name in wave.cells)
    alone = jax.jit(partial(advance, study=study, objectives=objectives, rollout_format="int8"))
    for i in (0, 3, 4, 7):
        run, expected = alone(jax.tree.map(lambda x, i=i: x[i], runs), jnp.int32(0))
        assert set(curves) == set(expected)
        for name in expected:
            np.testing.assert_allclose(curves[name][i], expected[name], rtol=1e-3, atol=2e-5)
        weights = jax.tree.map(lambda x, i=i: x[i], ended.state.model)
        for a, b in zip(leaves(weights), leaves(run.state.model), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5)


def test_objectives_differ(together):
    """Negative control: the runs that the test above compares differ from each other."""
    wave, runs, program = together
    ended, _ = program(runs, jnp.int32(0))
    flat = np.stack(
        [np.concatenate([x[i].ravel() for x in leaves(ended.state.model)]) for i in range(8)]
    )
    apart = np.abs(flat[:, None] - flat[None]).max(-1)
    assert (apart[~np.eye(8, dtype=bool)] > 0).all(), [m for m in wave.members]


def test_scores_together_are_scores_alone(study, starts):
    alone = jax.jit(partial(heldout_score, study=study))
    for start in starts.values():
        for i, score in enumerate(start.scores):
            model = jax.tree.map(lambda x, i=i: x[i], start.models)
            np.testing.assert_allclose(score, alone(model), rtol=1e-6)


@pytest.mark.parametrize(("asked", "got"), [("auto", "blocked"), ("dense", "dense")])
def test_experts_that_can_be_mapped(study, asked, got):
    model = dataclasses.replace(study.model, experts=asked)
    made = jax.eval_shape(partial(policy, dataclasses.replace(study, model=model)), KEY)
    assert made.config.experts == got


def test_a_step_is_that_of_the_training_program(study, starts):
    """Compares with the programs of `train.make_programs` on the same problems."""
    cell = study.cells()["N=2, R3"]
    rl = Reinforcement(
        prompts=4,
        group_size=4,
        max_tokens=study.task.max_tokens,
        rollout_format="int8",
        objective=dataclasses.replace(cell.objective, horizon=None),
        optimizer=study.optimizer,
        micro_batch_size=8,
    )
    sampling = Sampling(study.task.max_tokens, stop_ids=study.task.stop_ids, pad_id=0)
    programs = make_programs(rl, sampling)
    model = jax.tree.map(lambda x: x[0], starts["default"].models)
    optimizer = make_optimizer(study.optimizer)

    key = jax.random.key(5)
    step = partial(reinforce, study=study, objective=cell.objective, rollout_format="int8")
    state, curves = jax.jit(partial(step, optimizer=optimizer))(init_state(model, optimizer), key)

    of_problems, of_samples = jax.random.split(key)
    problems = repeated(study.task.problems(of_problems, 4), 4)
    trajectory = programs.rollout(
        programs.quantize(model), problems.prompts, problems.mask, of_samples
    )
    P = trajectory.prompt_width
    rewards = study.task.reward(problems, trajectory.tokens[:, P:], trajectory.response_mask[:, P:])
    lengths = trajectory.response_mask.sum(-1)
    everyone = jnp.ones(16, bool)
    advantages = programs.advantages(
        everyone, rewards, jnp.zeros(16), jnp.repeat(jnp.arange(4), 4), everyone, lengths
    )
    batch = make_batch(trajectory, advantages)
    batch = with_old_policy(batch, programs.score(model, batch))
    expected = init_state(model, optimizer)
    for part in programs.split(batch):
        expected, _ = programs.update(expected, part)
    np.testing.assert_allclose(curves["reward"], rewards.mean())
    assert float(jnp.abs(advantages).max()) > 0
    for a, b in zip(leaves(state.model), leaves(expected.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_choice_is_the_objective_chosen(index, rows):
    """Returns loss, gradient and the inputs of the metrics."""
    objectives = (
        Objective(mini_batches=2),
        Objective(mini_batches=2, loss=partial(minirl, clip=False, truncation=None)),
        Objective(mini_batches=2, loss=gspo, aggregation="seq-mean-token-mean"),
        Objective(mini_batches=2, loss=vespo, aggregation="token-mean"),
    )
    logp, entropy, batch = rows

    def loss(logp, objective):
        return objective.total(logp, entropy, batch)

    chosen = jax.jit(
        lambda logp, i: jax.value_and_grad(loss, has_aux=True)(logp, Choice(objectives, i))
    )
    got = chosen(logp, jnp.int32(index))
    expected = jax.value_and_grad(loss, has_aux=True)(logp, objectives[index])
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def rows():
    """Log-probabilities are far apart, so weights overflow if a loss does not bound them."""
    keys = jax.random.split(jax.random.key(0), 4)
    mask = jnp.arange(6)[None] < jnp.array([[6], [3], [0], [5]])
    logp, old, sampler = (jnp.where(mask, -40 * jax.random.uniform(k, (4, 6)), 0) for k in keys[:3])

    class Batch:
        logp_old, logp_rollout, response_mask = old, sampler, mask
        advantages = jnp.array([1.0, -1.0, 0.5, -0.5])

    return logp, jnp.ones((4, 6)), Batch


def test_other_programs():
    """Objectives with different passes cannot share a program."""
    base = Objective(mini_batches=2)
    same = dataclasses.replace(base, loss=dppo, aggregation="token-mean")
    assert program_of(base) == program_of(same)
    for other in (dict(mini_batches=4), dict(replay="R2"), dict(mini_batches=1)):
        assert program_of(base) != program_of(dataclasses.replace(base, **other))


def test_demonstrations_are_aligned(study):
    """A prompt is followed by its solution, and only the solution counts."""
    task = Reverse(smallest=2, largest=4, symbols=4)
    batch = demonstrations(task, jax.random.key(1), 16, 0.0)
    for tokens, segments, positions, counted in zip(*map(np.asarray, batch.values())):
        real = segments > 0
        texts = task.decode(tokens[real])
        middle = texts.index("=")
        assert texts[middle + 1 : -1] == texts[:middle][::-1] and texts[-1] == "<eos>"
        assert (positions[real] == np.arange(real.sum())).all()
        assert task.decode(tokens[counted]) == texts[middle + 1 :]


def test_mapped_rollouts_end_together(study, starts):
    """Members of a `vmap` may end at different times, without copies of the cache."""
    models = starts["default"].models
    problems = study.task.problems(jax.random.key(2), 3)
    sampling = Sampling(study.task.max_tokens, stop_ids=(1,), pad_id=0)
    keys = jax.random.split(jax.random.key(3), 2)
    # The second member's prompts are padding rows: it has nothing to sample.
    masks = jnp.stack([problems.mask, jnp.zeros_like(problems.mask)])

    def sample(model, mask, key):
        return rollout(model, problems.prompts, mask, key, sampling)

    mapped = jax.jit(jax.vmap(sample))
    got = mapped(models, masks, keys)
    for i in range(2):
        model = jax.tree.map(lambda x, i=i: x[i], models)
        expected = jax.jit(sample)(model, masks[i], keys[i])
        np.testing.assert_array_equal(got.tokens[i], expected.tokens)
        np.testing.assert_allclose(got.logp_rollout[i], expected.logp_rollout, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got.response_mask[i], expected.response_mask)
    assert got.response_mask[0].any() and not got.response_mask[1].any()
    config = study.model
    cache = (2, config.num_layers, 3, problems.mask.shape[1] + study.task.max_tokens)
    program = str(jax.make_jaxpr(jax.vmap(sample))(models, masks, keys))
    shape = ",".join(map(str, cache))
    assert shape in program
    selects = [line for line in program.splitlines() if "select_n" in line and f"[{shape}," in line]
    assert not selects, selects[:3]
