"""Checkpoints: what goes in comes out, the best survives, another model is refused."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import configs
from jaxrl_stable.checkpoint import Checkpointer, load_model
from jaxrl_stable.model import init_model
from jaxrl_stable.sharding import abstract_state, make_mesh
from jaxrl_stable.trainer.optimizer import from_parts, init_state, make_optimizer, to_parts


def numbers():
    dataset = grain.MapDataset.range(100).shuffle(seed=3).repeat().to_iter_dataset()
    return iter(dataset.batch(4))


@pytest.fixture(scope="module")
def state(config):
    optimizer = make_optimizer(configs.Optimizer())
    return init_state(init_model(config, 0), optimizer)


@pytest.fixture(scope="module")
def template(config):
    optimizer = make_optimizer(configs.Optimizer())
    mesh = make_mesh(configs.MeshShape(), jax.devices()[:1])
    return abstract_state(mesh, lambda: init_state(init_model(config, 0), optimizer))


@pytest.mark.fast
def test_round_trip_of_state_key_and_data_position(tmp_path, config, state, template):
    key, batches = jax.random.key(7), numbers()
    next(batches)
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        assert checkpoints.restore(to_parts(template)) is None
        checkpoints.save(5, to_parts(state) | {"key": key}, batches)
    expected = next(batches)
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        again = numbers()
        shape = jax.eval_shape(lambda: jax.random.key(0))
        parts = checkpoints.restore(to_parts(template) | {"key": shape}, again)
        assert checkpoints.steps == [5]
    restored = from_parts(parts)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.random.uniform(parts["key"]) == jax.random.uniform(key)
    np.testing.assert_array_equal(next(again), expected)


def test_a_checkpoint_without_a_position_is_not_resumed(tmp_path, config, state, template):
    """Starting the data over would silently repeat prompts."""
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        checkpoints.save(1, to_parts(state))
        with pytest.raises(ValueError, match="lacks a position in the data"):
            checkpoints.restore(to_parts(template), numbers())


def test_newest_and_best_are_kept(tmp_path, config, state):
    with Checkpointer(tmp_path, config.architecture(), keep=2) as checkpoints:
        for step, score in enumerate([0.3, 0.9, 0.1, None, 0.2]):
            checkpoints.save(step, to_parts(state), numbers(), score)
        assert checkpoints.steps == [1, 3, 4]
        assert checkpoints.best_step == 1


def test_step_that_exists_is_left_alone(tmp_path, config, state):
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        checkpoints.save(1, to_parts(state), numbers())
        checkpoints.save(1, to_parts(state), numbers())
        assert checkpoints.steps == [1]


def test_half_written_checkpoint_is_passed_over(tmp_path, config, state, template):
    """After SIGKILL during a save, a directory with a temporary name is left."""
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        checkpoints.save(1, to_parts(state), numbers())
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "model").mkdir()
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        assert checkpoints.steps == [1]
        assert checkpoints.restore(to_parts(template)) is not None


@pytest.mark.fast
def test_another_model_is_refused_before_anything_is_read(tmp_path, config, state, template):
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        checkpoints.save(1, to_parts(state), numbers())
    other = dataclasses.replace(config, num_layers=4, rope_theta=5.0)
    with (
        Checkpointer(tmp_path, other.architecture()) as checkpoints,
        pytest.raises(ValueError, match=r"num_layers is 3 there and 4 here; rope_theta is"),
    ):
        checkpoints.restore(to_parts(template))
    with (
        Checkpointer(tmp_path, config.architecture()) as checkpoints,
        pytest.raises(ValueError, match="only one of them has"),
    ):
        checkpoints.restore({"optimizer": {"other": jnp.zeros(())}})


def test_changed_data_is_refused(tmp_path, config, state, template):
    """A position means nothing in other data."""
    with Checkpointer(tmp_path, config.architecture(), data="Source(a)") as checkpoints:
        checkpoints.save(1, to_parts(state), numbers())
    with (
        Checkpointer(tmp_path, config.architecture(), data="Source(b)") as checkpoints,
        pytest.raises(
            ValueError, match=r"was trained on Source\(a\) but the data is now Source\(b"
        ),
    ):
        checkpoints.restore(to_parts(template), numbers())


def test_changed_settings_are_refused_by_name(tmp_path, config, state, template):
    """Entries that one side does not know are not compared, and are not lost."""

    def checkpointer(**settings):
        return Checkpointer(tmp_path, config.architecture(), settings=settings)

    with checkpointer(samples=8, reward="numeric", later=[1, None]) as checkpoints:
        checkpoints.save(1, to_parts(state), numbers())
    with (
        checkpointer(samples=4, reward="exact") as checkpoints,
        pytest.raises(
            ValueError,
            match=r"reward is 'numeric' there and 'exact' here; samples is 8 there and 4 here\. C",
        ),
    ):
        checkpoints.restore(to_parts(template), numbers())
    with checkpointer(samples=4) as checkpoints:  # without a position: another run, or `evaluate`
        assert checkpoints.restore({"model": template.model}) is not None
    with checkpointer(samples=8, newer=1) as checkpoints:
        assert checkpoints.restore(to_parts(template), numbers()) is not None
        checkpoints.save(2, to_parts(state), numbers())
    for settings in ({"newer": 2}, {"reward": "exact"}, {"later": [1]}):
        with checkpointer(**settings) as checkpoints, pytest.raises(ValueError, match="settings"):
            checkpoints.restore(to_parts(template), numbers())


def test_checkpoints_of_an_older_version_have_no_settings(
    tmp_path, config, state, template, monkeypatch
):
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        save = checkpoints._orbax.save_checkpointables
        monkeypatch.setattr(
            checkpoints._orbax,
            "save_checkpointables",
            lambda step, items, **options: save(step, _without_settings(items), **options),
        )
        checkpoints.save(1, to_parts(state), numbers())
        assert "settings" not in checkpoints._about(1)
    with Checkpointer(tmp_path, config.architecture(), settings={"samples": 8}) as checkpoints:
        assert checkpoints.restore(to_parts(template), numbers()) is not None


def _without_settings(items):
    about = {name: value for name, value in items["about"].items() if name != "settings"}
    return items | {"about": about}


def test_execution_fields_do_not_matter(tmp_path, config, state, template):
    with Checkpointer(tmp_path, config.architecture()) as checkpoints:
        checkpoints.save(1, to_parts(state), numbers())
    other = dataclasses.replace(config, remat="block", scan_layers=False, experts="dense")
    model = load_model(tmp_path, other.architecture(), template.model)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_missing_checkpoints_are_named(tmp_path, config, template):
    with pytest.raises(ValueError, match="is not a directory"):
        load_model(tmp_path / "absent", config.architecture(), template.model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no checkpoint"):
        load_model(tmp_path / "empty", config.architecture(), template.model)
