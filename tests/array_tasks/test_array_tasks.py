"""Properties of every array task; one program per task draws, solves and grades."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import array_tasks

RIGHT, WRONG, HELDOUT, SLIPPING, OTHER = range(5)  # the runs


def rows(prompts):
    return {tuple(row) for row in prompts.tolist()}


def test_the_teacher_is_right_without_slips_and_wrong_with_nothing_else(runs):
    assert runs.rewards.dtype == np.float32
    assert (runs.rewards[[RIGHT, HELDOUT, OTHER]] == 1).all()
    assert runs.rewards[WRONG].mean() < 0.02


def test_slips_are_as_frequent_as_asked(runs):
    np.testing.assert_array_equal(runs.mask[RIGHT], runs.mask[SLIPPING])
    # The first step depends on no other, so it is wrong exactly as often as the teacher slips.
    wrong = runs.responses[RIGHT] != runs.responses[SLIPPING]
    assert wrong[:, 0].mean() == pytest.approx(0.25, abs=0.04)
    assert 0.05 < runs.rewards[SLIPPING].mean() < 0.85


def test_layout_is_that_of_a_rollout(runs, task):
    problems, responses, mask, _ = runs
    prompts = problems.prompts
    assert prompts.shape[2] == task.prompt_width and responses.shape[2] == task.max_tokens
    np.testing.assert_array_equal(problems.mask, prompts != task.pad_id)
    assert (np.diff(problems.mask.astype(int), axis=-1) >= 0).all()  # left-padded
    assert (np.diff(mask.astype(int), axis=-1) <= 0).all()  # right-padded
    assert (responses[~mask] == task.pad_id).all()
    ends = np.isin(responses, task.stop_ids)
    np.testing.assert_array_equal(ends.sum(-1), 1)
    np.testing.assert_array_equal(ends.argmax(-1), mask.sum(-1) - 1)
    assert mask.sum(-1).max() == task.max_tokens and problems.mask.sum(-1).max() == prompts.shape[2]
    for tokens in (prompts, responses):
        assert tokens.dtype == np.int32 and tokens.min() >= 0 and tokens.max() < task.vocab_size
    assert task.vocab_size < 32


def test_sizes_cover_their_range_evenly(runs, task):
    answer = runs.problems.answer
    if isinstance(task, array_tasks.ModularAddition):
        drawn, expected = answer.values[..., 0], range(task.modulus)
    else:
        drawn, expected = answer.size, range(task.smallest, task.largest + 1)
    for split in (drawn[HELDOUT], drawn[[RIGHT, OTHER]]):
        found, counts = np.unique(split, return_counts=True)
        np.testing.assert_array_equal(found, expected)
        # A size with few problems may have another share in each split.
        few = isinstance(task, array_tasks.ModularAddition | array_tasks.Parity)
        assert counts.min() > (0.2 if few else 0.7) * counts.mean()


def test_splits_have_no_prompt_in_common(runs):
    prompts = runs.problems.prompts
    train, heldout = rows(np.concatenate(prompts[[RIGHT, WRONG, OTHER]])), rows(prompts[HELDOUT])
    assert not train & heldout
    assert len(heldout) > 50 and len(train) > 3 * 50


def test_one_problem_in_four_is_held_out():
    prompts = np.stack(np.meshgrid(*[np.arange(2, 12)] * 4), -1).reshape(-1, 4)
    split = jax.jit(jax.vmap(array_tasks.is_heldout))
    heldout = np.asarray(split(prompts))
    assert heldout.mean() == pytest.approx(0.25, abs=0.02)
    for place in range(4):  # no symbol at any position determines the split
        by_symbol = [heldout[prompts[:, place] == symbol].mean() for symbol in range(2, 12)]
        np.testing.assert_allclose(by_symbol, 0.25, atol=0.06)
    # The order of symbols matters: independent splits agree in (1/4)² + (3/4)² of all cases.
    backwards = split(prompts[:, ::-1])
    assert (heldout == backwards).mean() == pytest.approx(0.625, abs=0.05)
    padded = split(np.pad(prompts, ((0, 0), (3, 0))))
    np.testing.assert_array_equal(heldout, padded)


@pytest.mark.fast
@pytest.mark.parametrize("task", [array_tasks.ChainSum()], indirect=True, ids=["ChainSum"])
def test_mapped_runs_equal_single_ones_of_another_size(runs, task):
    key = jax.random.split(jax.random.key(2))[0]
    single = jax.jit(lambda key: task.problems(key, 3, heldout=True))(key)
    mapped = jax.tree.map(lambda x: x[HELDOUT, :3], runs.problems)
    assert jax.tree.structure(single) == jax.tree.structure(mapped)
    for alone, together in zip(jax.tree.leaves(single), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("task", [array_tasks.ChainSum()], indirect=True, ids=["ChainSum"])
def test_other_keys_splits_and_slips_do_not_recompile(program):
    program(jnp.arange(4, 9), jnp.ones(5, bool), jnp.zeros(5))
    program(jnp.arange(9, 14), jnp.zeros(5, bool), jnp.ones(5))
    assert program._cache_size() == 1


def test_the_key_decides_on_the_problems(runs):
    prompts = runs.problems.prompts
    assert (prompts[RIGHT] != prompts[OTHER]).any(-1).mean() > 0.9
    np.testing.assert_array_equal(prompts[RIGHT], prompts[SLIPPING])


@pytest.fixture(scope="module")
def graded(task, runs):
    """Returns `graded(responses, mask)`: rewards of the first run's problems, by reward kind."""
    problems = jax.tree.map(lambda x: x[RIGHT], runs.problems)
    kinds = [dataclasses.replace(task, reward_kind=kind) for kind in task.REWARD_KINDS]
    jitted = jax.jit(lambda *response: [kind.reward(problems, *response) for kind in kinds])
    return lambda *response: dict(
        zip(task.REWARD_KINDS, map(np.asarray, jitted(*response)), strict=True)
    )


def test_what_the_mask_hides_changes_nothing(graded, runs, task):
    responses, mask = runs.responses[RIGHT], runs.mask[RIGHT]
    noise = np.random.default_rng(0).integers(0, task.vocab_size, responses.shape)
    for shown in (mask, noise % 2 == 0, np.zeros_like(mask)):
        plain = graded(np.where(shown, responses, 0), shown)
        hidden = graded(np.where(shown, responses, noise), shown)
        for kind, rewards in plain.items():
            np.testing.assert_array_equal(rewards, hidden[kind])
            if not shown.any():
                assert (rewards == 0).all()


def test_a_response_without_eos_is_wrong(graded, runs, task):
    responses, mask = runs.responses[RIGHT], runs.mask[RIGHT]
    cut = mask & ~np.isin(responses, task.stop_ids)
    for kind, rewards in graded(responses, cut).items():
        # One position of the longer response is missing.
        expected = 1 - 1 / mask.sum(-1) if kind == "per_position" else 0
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    running_on = np.where(responses == task.stop_ids[0], task.vocab_size - 1, responses)
    assert (graded(running_on, mask)["binary"] == 0).all()
    # Nothing may follow EOS, and a right prefix of the wrong length is not enough.
    everything = np.ones_like(mask)
    short = mask.sum(-1) < task.max_tokens
    assert (graded(responses, everything)["binary"][short] == 0).all()


def test_any_tokens_have_a_reward_in_range(graded, runs, task):
    rng = np.random.default_rng(1)
    shape = count, width = runs.mask[RIGHT].shape
    tokens = rng.integers(0, task.vocab_size + 3, shape)  # the model may know more ids
    prefix = np.arange(width) < rng.integers(0, width + 1, (count, 1))
    for mask in (prefix, rng.random(tokens.shape) < 0.5):
        for rewards in graded(tokens, mask).values():
            assert ((rewards >= 0) & (rewards <= 1)).all()  # a NaN would fail both comparisons


def test_responses_of_another_width_are_refused(task, runs):
    problems = jax.tree.map(lambda x: x[RIGHT], runs.problems)
    with pytest.raises(ValueError, match="both need shape"):
        task.reward(problems, runs.responses[RIGHT, :, 1:], runs.mask[RIGHT, :, 1:])


def test_decoding_names_each_token(task):
    assert task.decode([0, 1, task.vocab_size]) == ["<pad>", "<eos>", f"<{task.vocab_size}>"]
    assert len(set(task.decode(range(task.vocab_size)))) == task.vocab_size


def test_a_task_is_a_static_argument(task):
    assert task == dataclasses.replace(task) and hash(task) == hash(dataclasses.replace(task))
    assert task != dataclasses.replace(task, reward_kind=task.REWARD_KINDS[1])


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("Reverse", {"smallest": 5, "largest": 4}, "Reverse.smallest is 5 and largest 4"),
        ("Reverse", {"reward_kind": "answer"}, "Reverse.reward_kind is 'answer'"),
        ("Sort", {"symbols": 27}, "Sort.symbols is 27"),
        ("Parity", {"smallest": 1}, "Parity.smallest is 1"),
        ("Parity", {"smallest": 2, "largest": 3}, "12 distinct problems"),
        ("ModularAddition", {"modulus": 1}, "ModularAddition.modulus is 1"),
        ("Countdown", {"smallest": 1}, "Countdown.smallest is 1"),
        ("Countdown", {"reward_kind": "per_position"}, "use one of 'binary', 'legal'"),
    ],
)
def test_impossible_settings_are_refused(name, fields, words):
    with pytest.raises(ValueError, match=words):
        getattr(array_tasks, name)(**fields)
