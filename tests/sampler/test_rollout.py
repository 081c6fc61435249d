"""The sampler records what the training program would compute."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.model import token_log_probs
from jaxrl_stable.sampler.rollout import Sampling, draw, rollout
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.forward import policy_log_probs


@pytest.fixture(scope="module")
def rescore(model):
    """`rescore(trajectory, temperature)` computes log-probabilities by the training program."""

    @partial(jax.jit, static_argnums=2)
    def scored(model, batch, temperature):
        return policy_log_probs(model, batch, None, temperature)

    def rescore(trajectory, temperature=1.0):
        batch = make_batch(trajectory, np.zeros(len(trajectory.tokens), np.float32))
        return scored(model, batch, temperature)

    return rescore


def test_layout(trajectory, prompts):
    """Prompts are left-padded; responses start at column P, include EOS, and end in padding."""
    tokens, mask = prompts
    P = trajectory.prompt_width
    np.testing.assert_array_equal(trajectory.tokens[:, :P], tokens)
    np.testing.assert_array_equal(trajectory.real[:, :P], mask)
    assert not trajectory.response_mask[:, :P].any()
    response = np.asarray(trajectory.response_mask[:, P:])
    lengths = response.sum(-1)
    np.testing.assert_array_equal(response, np.arange(response.shape[1])[None] < lengths[:, None])
    sampled = np.asarray(trajectory.tokens[:, P:])
    stops = np.isin(sampled, (2, 3, 4)) & response
    last = response & ~np.roll(np.pad(response, ((0, 0), (0, 1))), -1, 1)[:, :-1]
    assert not (stops & ~last).any()  # a stop token is always the last one
    np.testing.assert_array_equal(trajectory.finished, stops.any(-1))
    assert 0 < np.asarray(trajectory.finished).sum() < len(lengths)  # the test has both kinds
    assert (lengths[~np.asarray(trajectory.finished)] == response.shape[1]).all()
    assert (sampled[~response] == 0).all()
    assert (np.asarray(trajectory.logp_rollout)[~np.asarray(trajectory.response_mask)] == 0).all()


def test_routing_covers_every_fed_token(trajectory):
    """All prompt and response tokens have a row, except the last sampled one, never an input."""
    last = np.asarray(trajectory.real).cumsum(-1) == np.asarray(trajectory.real).sum(-1)[:, None]
    expected = np.asarray(trajectory.real) & ~(last & np.asarray(trajectory.response_mask))
    np.testing.assert_array_equal(trajectory.routing.valid, expected)


@pytest.mark.fast
def test_log_probs_equal_a_teacher_forced_rescore(model, sample, rescore):
    """64 sampled sequences, every token, float32."""
    worst, count = 0.0, 0
    for seed in range(4):
        trajectory = sample(model, jax.random.key(100 + seed))
        scored, _ = rescore(trajectory)
        worst = max(worst, float(jnp.abs(scored.logp - trajectory.logp_rollout).max()))
        count += len(trajectory.tokens)
    assert count == 64
    assert worst <= 1e-4


def test_temperature_is_the_same_on_both_sides(model, prompts, rescore):
    """The trainer scores the distribution that was sampled, not that of temperature 1."""
    sampling = Sampling(4, temperature=0.6, stop_ids=(2,))
    run = jax.jit(partial(rollout, sampling=sampling))(model, *prompts, jax.random.key(0))
    deviation = {
        t: float(jnp.abs(rescore(run, t)[0].logp - run.logp_rollout).max()) for t in (0.6, 1.0)
    }
    assert deviation[0.6] <= 1e-4 < 0.1 < deviation[1.0]


def test_routing_equals_that_of_the_training_forward(trajectory, rescore):
    """With the same weights, decoding with a cache chooses the same experts."""
    _, router = rescore(trajectory)
    valid = np.asarray(trajectory.routing.valid)
    ours = np.asarray(trajectory.routing.experts)[:, valid]
    theirs = np.asarray(router.experts)[:, valid]
    np.testing.assert_array_equal(ours, theirs)


def test_rows_do_not_depend_on_each_other(model, prompts, trajectory):
    """If padding rows are added and other rows changed, row b samples the same tokens."""
    tokens, mask = prompts
    sampling = Sampling(9, stop_ids=(2, 3, 4))
    more = (np.pad(tokens, ((0, 3), (0, 0))), np.pad(mask, ((0, 3), (0, 0))))
    more[0][0] = 7
    wider = jax.jit(partial(rollout, sampling=sampling))(model, *more, jax.random.key(1))
    rows = slice(1, len(tokens))
    np.testing.assert_array_equal(wider.tokens[rows], trajectory.tokens[rows])
    np.testing.assert_allclose(wider.logp_rollout[rows], trajectory.logp_rollout[rows], atol=2e-6)
    assert not wider.real[len(tokens) :].any()
    assert not wider.routing.valid[len(tokens) :].any()


def test_left_padding_does_not_matter(model, prompts, trajectory):
    """More padding columns give the same samples: positions and mask count real tokens only."""
    tokens, mask = prompts
    wide = (np.pad(tokens, ((0, 0), (4, 0))), np.pad(mask, ((0, 0), (4, 0))))
    # The key of a token depends on its column: compare greedy samples, which need none.
    greedy = Sampling(5, temperature=0.0, stop_ids=(2, 3, 4))
    run = jax.jit(partial(rollout, sampling=greedy))
    narrow_run, wide_run = (run(model, *p, jax.random.key(0)) for p in (prompts, wide))
    P = tokens.shape[1]
    np.testing.assert_array_equal(narrow_run.tokens[:, P:], wide_run.tokens[:, P + 4 :])
    np.testing.assert_allclose(
        narrow_run.logp_rollout[:, P:], wide_run.logp_rollout[:, P + 4 :], atol=1e-5
    )


def test_samples_follow_the_distribution(model, prompts):
    """Compares first tokens of many identical prompts with the exact distribution (chi-squared)."""
    n = 4096
    tokens, mask = (np.repeat(x[:1], n, axis=0) for x in prompts)
    sampling = Sampling(1, temperature=0.7)
    run = jax.jit(partial(rollout, sampling=sampling))(model, tokens, mask, jax.random.key(3))
    P = tokens.shape[1]
    counts = np.bincount(np.asarray(run.tokens[:, P]), minlength=32)
    positions = np.maximum(mask[:1].cumsum(-1) - 1, 0)

    @jax.jit
    def every_log_prob(model):
        hidden = model(tokens[:1], positions, mask[:1].astype(np.int32)).hidden[:, -1:]
        hidden = jnp.broadcast_to(hidden, (1, 32, hidden.shape[-1]))
        return token_log_probs(model, hidden, jnp.arange(32)[None], 0.7).logp[0]

    logp = every_log_prob(model)
    expected = n * np.exp(np.asarray(logp, np.float64))
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 61.1  # 99.9 % quantile with 31 degrees of freedom
    np.testing.assert_allclose(
        run.logp_rollout[:, P], np.asarray(logp)[np.asarray(run.tokens[:, P])], atol=1e-5
    )


@pytest.mark.fast
def test_truncated_sampling_keeps_the_likeliest_tokens():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.25, 0.05]))
    keys = jax.random.split(jax.random.key(0), 500)

    def drawn(**options):
        one = partial(draw, sampling=Sampling(1, **options))
        return set(np.asarray(jax.vmap(one, (0, None))(keys, logits)).tolist())

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=99) == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.6) == {1, 3}  # 0.4 alone does not reach it
    assert drawn(top_p=0.3) == {1}
    assert drawn(temperature=0.0) == {1}


def test_truncated_sampling_records_untruncated_log_probs(model, prompts, rescore):
    sampling = Sampling(4, top_k=3, stop_ids=(2,))
    run = jax.jit(partial(rollout, sampling=sampling))(model, *prompts, jax.random.key(0))
    scored, _ = rescore(run)
    np.testing.assert_allclose(run.logp_rollout, scored.logp, atol=1e-4)


def test_loop_stops_when_every_row_is_done(model, prompts):
    """If every token is a stop token, responses have length one, whatever the limit."""
    sampling = Sampling(6, stop_ids=tuple(range(32)))
    run = jax.jit(partial(rollout, sampling=sampling))(model, *prompts, jax.random.key(0))
    assert (run.response_mask.sum(-1) == 1).all()
    assert run.finished.all()
    P = run.prompt_width
    assert not run.routing.valid[:, P:].any()  # nothing was fed after the prompt


def test_rows_sampled_in_lots_are_the_same(model, prompts, trajectory):
    """Each group of rows stops on its own; keys, routing and padding stay with their rows."""
    sampling = Sampling(9, stop_ids=(2, 3, 4))  # the fixture's own
    lots = jax.jit(partial(rollout, sampling=sampling, at_a_time=4))
    actual = lots(model, *prompts, jax.random.key(1))
    assert actual.prompt_width == trajectory.prompt_width
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(trajectory), strict=True):
        if a.dtype == jnp.float32:
            np.testing.assert_allclose(a, b, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_bad_sampling_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**({"max_tokens": 4} | bad))
