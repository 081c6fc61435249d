"""Each recipe has the constants that its paper published, and trains."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import gin_files
from jaxrl_stable.model.head import HeadOutput
from jaxrl_stable.objectives import aggregate
from jaxrl_stable.published import PUBLISHED
from jaxrl_stable.train import train
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.update import measure

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted((ROOT / "experiments" / "recipes").glob("*.gin"))
INDEX = (ROOT / "experiments" / "recipes" / "README.md").read_text()
REGIMES = {f"minirl_{regime}": "minirl" for regime in ("on_policy", "r2", "r3")}


LAID_OVER_EACH_OTHER = "dapo", "off_policy_sequence_mask"


def load(*recipes, bindings=()):
    files = [str(ROOT / "tests" / "experiment.gin"), *map(str, recipes)]
    return gin_files.load_experiment(files, ["configs.Reinforcement.prompts=8", *bindings])


@pytest.mark.fast
def test_every_published_objective_has_a_recipe_and_a_line_in_the_index():
    names = {recipe.stem for recipe in RECIPES}
    assert names - set(REGIMES) == set(PUBLISHED) - {"minirl", "gspo_token"}
    for recipe in RECIPES:
        assert f"[`{recipe.name}`]({recipe.name})" in INDEX
        text = recipe.read_text()
        assert f"experiments/recipes/{recipe.name}" in text
        for heading in ("# When: ", "# Expect: "):
            assert heading in text, (recipe.name, heading)
        assert re.search(r"# Expect: .*token", text), recipe.name
    assert set(re.findall(r"\]\(([a-z0-9_]+\.gin)\)", INDEX)) == {r.name for r in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipe_is_what_was_published(recipe):
    """Loss, constants, corrections, advantages and reduction give the numbers of `PUBLISHED`."""
    published = PUBLISHED[REGIMES.get(recipe.stem, recipe.stem)]
    objective = load(recipe).reinforcement.resolved_objective
    rng = np.random.default_rng(0)
    B, T = 12, 9
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    rollout = rng.uniform(-3, -0.1, (B, T))
    # Small enough for some responses to be within the bounds of a geometric mean of .99 to 1.01.
    old = rollout + (0.02 if recipe.stem == "geometric_mask" else 0.4) * rng.normal(size=(B, T))
    near = recipe.stem in ("gspo", "luspo")
    logp = old + (2e-3 if near else 0.5) * rng.normal(size=(B, T))
    rewards, groups = jnp.asarray(rng.integers(0, 2, B), jnp.float32), np.arange(B) // 4
    lengths = mask.sum(-1)
    advantages = published.advantages(rewards, groups, None, lengths)
    ours = objective.advantages(rewards, groups, None, lengths)
    np.testing.assert_allclose(ours, advantages, rtol=1e-6)
    arrays = [jnp.asarray(x, jnp.float32) for x in (logp, old, rollout)]

    def theirs_of(x):
        return published(x, *arrays[1:], advantages, mask, horizon=objective.horizon)[0]

    def ours_of(x):
        out, _ = objective.token_loss(x, *arrays[1:], advantages, mask)
        return aggregate(out.loss, mask, objective.aggregation, objective.horizon)[0]

    ours, theirs = (jax.value_and_grad(f)(arrays[0]) for f in (ours_of, theirs_of))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    assert np.abs(theirs[1]).max() > 1e-3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipe_fits_the_update(recipe, trajectory, advantages):
    """Traced, not run: loss, terms and metrics of a mini-batch, without the model."""
    objective = load(recipe).reinforcement.resolved_objective
    batch = make_batch(trajectory, advantages)
    logp = batch.logp_rollout
    batch = dataclasses.replace(batch, logp_old=logp, logp_reference=logp)

    def measured(scored):
        _, decided = objective.total(scored.logp, scored.entropy, batch)
        return measure(decided, scored, batch)

    metrics = jax.eval_shape(measured, HeadOutput(logp, logp))
    assert "clip/high_share" in metrics
    assert ("reference/kl" in metrics) == bool(objective.kl_coefficient)
    assert ("correction/dropped_share" in metrics) == bool(objective.corrections)


def test_recipes_train(tmp_path):
    """Makes two whole steps with two recipes combined: dynamic sampling and overlong punishment
    from one; the mask, the reference policy and the KL from the other.
    """
    files = [str(RECIPES[0].with_name(f"{name}.gin")) for name in LAID_OVER_EACH_OTHER]
    bindings = ["configs.Reinforcement.steps=2", "configs.Objective.mini_batches=2"]
    experiment = load(*files, bindings=bindings)
    rl = experiment.reinforcement
    assert rl.max_rounds == 4 and rl.objective.corrections and rl.objective.kl_weighted
    state = train(experiment, tmp_path)
    assert int(state.step) == 4 and int(state.skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_every_recipe_trains(recipe, tmp_path):
    bindings = ["configs.Reinforcement.steps=1", "configs.Objective.mini_batches=2"]
    state = train(load(recipe, bindings=bindings), tmp_path)
    assert int(state.step) == 2 and int(state.skipped) == 0
