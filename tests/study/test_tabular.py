"""The theory behind MiniRL, without sampling noise: expectations over all V^T sequences.

The token-level gradients are differentiated from `objectives.minirl` through `tabular`; NumPy
references here work with probabilities and prefixes written out, and share no code with either.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.advantages import centered
from jaxrl_stable.objectives import aggregate, minirl
from jaxrl_stable.study import tabular
from jaxrl_stable.study.tabular import ESTIMATORS, expectation, random_problem

EXACT = 1e-12
SIZES = [(6, 3), (6, 4), (2, 5)]  # (V, T)
# (mismatch, staleness)
DISTANCES = [(0.5, 0.0), (0.0, 0.5), (0.4, 0.3), (1.0, 0.0)]
UNTRUNCATED = {"truncation": None, "clip": False}


def error(actual, expected):
    """Returns the relative error in the Euclidean norm."""
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def token_expectation(problem, advantages=None, **options):
    advantages = problem.rewards if advantages is None else advantages
    return expectation(problem, tabular.token_gradients(problem, advantages, **options))


def numpy_weights(problem):
    """Returns π_θ/μ_old of every token of every sequence."""
    tables = [np.exp(logits) for logits in (problem.logits, problem.logits_rollout)]
    theta, rollout = (table / table.sum(-1, keepdims=True) for table in tables)
    return (theta / rollout)[problem.prefixes, problem.tokens]


def numpy_token_expectation(problem, weight):
    """Returns Σ_y μ(y) R(y) Σ_t w_t ∇log π_θ(y_t|y_<t), by sequence and token.

    `weight(p, p_old, p_rollout)` is w_t as a function of the three probabilities of the token.
    """
    vocab = problem.logits.shape[1]
    length = problem.tokens.shape[1]
    symbols = range(vocab)
    prefixes = [p for t in range(length) for p in itertools.product(symbols, repeat=t)]
    tables = (problem.logits, problem.logits_old, problem.logits_rollout)
    theta, old, rollout = (
        {p: np.exp(row) / np.exp(row).sum() for p, row in zip(prefixes, table, strict=True)}
        for table in tables
    )
    total = {p: np.zeros(vocab) for p in prefixes}
    sequences = itertools.product(symbols, repeat=length)
    for y, reward in zip(sequences, problem.rewards, strict=True):
        mu = np.prod([rollout[y[:t]][y[t]] for t in range(length)])
        for t in range(length):
            now, before = y[t], y[:t]
            score = np.eye(vocab)[now] - theta[before]
            w = weight(theta[before][now], old[before][now], rollout[before][now])
            total[before] += mu * reward * w * score
    return np.array([total[p] for p in prefixes])


@pytest.mark.fast
def test_every_sequence_and_every_prefix_once():
    tokens, prefixes = tabular.enumerate_sequences(2, 3)
    np.testing.assert_array_equal(tokens, list(itertools.product(range(2), repeat=3)))
    # Rows: (), (0), (1), (0,0), (0,1), (1,0), (1,1).
    expected = [[0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]]
    np.testing.assert_array_equal(prefixes, np.repeat(expected, 2, axis=0))
    for vocab, length in SIZES:
        problem = random_problem(0, 1.0, 1.0, vocab, length)
        rows = {tuple(y[:t]): row[t] for y, row in zip(*problem[:2]) for t in range(length)}
        assert sorted(rows.values()) == list(range(len(problem.logits)))
        np.testing.assert_allclose(tabular.rollout_probabilities(problem).sum(), 1.0, rtol=EXACT)


@pytest.mark.fast
def test_hand_computed_bandit():
    """π = (½, ½), μ = (¼, ¾), R = (1, 0): ∇J = (¼, −¼), and one sequence has the whole gradient."""
    tokens, prefixes = tabular.enumerate_sequences(2, 1)
    pi, mu = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    problem = tabular.Problem(tokens, prefixes, np.array([1.0, 0.0]), pi, pi, mu)
    np.testing.assert_allclose(tabular.true_gradient(problem), [[0.25, -0.25]], rtol=EXACT)
    np.testing.assert_allclose(tabular.centered_rewards(problem), [0.75, -0.25], rtol=EXACT)
    for gradients in (
        tabular.token_gradients(problem, problem.rewards, **UNTRUNCATED),
        tabular.sequence_gradients(problem, problem.rewards),
    ):
        np.testing.assert_allclose(gradients, [[[1.0, -1.0]], [[0.0, 0.0]]], atol=EXACT)
        # E‖ĝ‖² − ‖E ĝ‖² = ¼·2 − ⅛ = ⅜, over ‖∇J‖² = ⅛
        found = tabular.quality(problem, gradients)
        np.testing.assert_allclose(found, (0.0, 1.0, np.sqrt(3.0)), atol=EXACT)
    unweighted = tabular.token_gradients(problem, problem.rewards, weight="none", clip=False)
    found = tabular.quality(problem, unweighted)
    # half of the length; E‖ĝ‖² − ‖E ĝ‖² = ¼·½ − 1/32 = 3/32
    np.testing.assert_allclose(found, (0.5, 1.0, np.sqrt(0.75)), rtol=EXACT)
    sideways = np.array([[[4.0, 4.0]], [[0.0, 0.0]]])
    np.testing.assert_allclose(tabular.quality(problem, sideways)[1], 0.0, atol=EXACT)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sequence_level_is_unbiased(size):
    """Eq. 2 is the gradient of eq. 1, however far the policies are apart."""
    for distances in DISTANCES:
        problem = random_problem(1, *distances, *size)
        truth = tabular.true_gradient(problem)
        for advantages in (problem.rewards, tabular.centered_rewards(problem)):
            gradients = tabular.sequence_gradients(problem, advantages)
            assert error(expectation(problem, gradients), truth) < EXACT
        for weight in ("full", "none"):
            assert error(token_expectation(problem, weight=weight, **UNTRUNCATED), truth) > 0.05


@pytest.mark.fast
def test_one_step_is_a_sequence():
    problem = random_problem(1, 0.8, 0.8, length=1)
    truth = tabular.true_gradient(problem)
    assert error(token_expectation(problem, **UNTRUNCATED), truth) < EXACT
    assert error(token_expectation(problem, weight="none", **UNTRUNCATED), truth) > 0.05


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_estimators_are_the_true_gradient_when_the_policies_agree(size):
    """This includes clipped and truncated estimators; it is exact only if the policies agree."""
    problem = random_problem(2, 0.0, 0.0, *size)
    truth = tabular.true_gradient(problem)
    for name, estimator in ESTIMATORS.items():
        for advantages in (problem.rewards, tabular.centered_rewards(problem)):
            assert error(expectation(problem, estimator(problem, advantages)), truth) < EXACT, name


token_objective_gradient = jax.jit(jax.grad(tabular.token_objective))


@pytest.mark.fast
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_library_loss_has_the_gradient_of_the_token_objective(size):
    """Eq. 4 follows from eq. 3: differentiating log π with a constant weight gives ∇(π/μ)."""
    for distances in DISTANCES:
        problem = random_problem(3, *distances, *size)
        with jax.enable_x64(True):
            expected = np.asarray(token_objective_gradient(problem.logits, problem))
        assert error(token_expectation(problem, **UNTRUNCATED), expected) < EXACT


@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (1, 1)], ids=["mismatch", "stale", "both"])
def test_token_level_bias_falls_linearly(direction):
    """Halving the distance halves the bias: the second-order terms vanish twice as fast."""
    sigmas = 0.08 / 2.0 ** np.arange(7)
    for seed, length in itertools.product(range(3), (3, 4)):
        biases = []
        for sigma in sigmas:
            problem = random_problem(seed, *(sigma * np.array(direction)), length=length)
            truth = tabular.true_gradient(problem)
            biases.append(error(token_expectation(problem, **UNTRUNCATED), truth))
        ratios = np.array(biases[:-1]) / biases[1:]
        assert biases[0] > 0.5 * sigmas[0]  # linear with a slope, not absent
        assert (np.abs(ratios - 2.0) < 5.0 * sigmas[:-1]).all(), ratios
        assert abs(ratios[-1] - 2.0) < 5e-3, ratios


def test_objectives_agree_to_first_order():
    """Π(1+δ_t) − 1 − Σδ_t is O(σ²), and so is J_seq minus its expansion by J_token.

    J_token sums T weights where the expansion has 1 + Σδ_t, so it is larger by the constant
    (T−1) E_μ[R]; the gradient does not see it.
    """
    sigmas = 0.01 / 2.0 ** np.arange(7)
    for seed, length in itertools.product(range(3), (3, 4)):
        by_sequence, by_value = [], []
        for sigma in sigmas:
            problem = random_problem(seed, sigma, sigma, length=length)
            mu = tabular.rollout_probabilities(problem)
            with jax.enable_x64(True):
                exact = float(tabular.sequence_objective(problem.logits, problem))
                surrogate = float(tabular.token_objective(problem.logits, problem))
            delta = numpy_weights(problem) - 1
            remainder = np.prod(1 + delta, -1) - 1 - delta.sum(-1)
            by_sequence.append(np.abs(remainder).max())
            by_value.append(exact - (surrogate - (length - 1) * mu @ problem.rewards))
            # Both values by their definitions: only the remainder separates them.
            np.testing.assert_allclose(exact, mu * np.prod(1 + delta, -1) @ problem.rewards)
            np.testing.assert_allclose(by_value[-1], mu * remainder @ problem.rewards, atol=1e-14)
        for remainders in np.array([by_sequence, by_value]):
            ratios = remainders[:-1] / remainders[1:]
            assert abs(remainders[0]) > 1e-3 * sigmas[0] ** 2
            assert (np.abs(ratios - 4.0) < 100 * sigmas[:-1]).all(), ratios  # 0.03 at the end


@pytest.mark.fast
def test_truncation_is_of_the_product_per_token_and_one_sided():
    """Compares min(π_θ/μ_old, C) with NumPy if weights exceed C; without any, it has no effect."""
    for cap, distance in ((5.0, 0.25), (2.0, 0.1)):
        near = random_problem(4, distance, distance)
        assert 0.7 * cap < numpy_weights(near).max() < cap
        capped = token_expectation(near, truncation=cap, clip=False)
        assert error(capped, token_expectation(near, **UNTRUNCATED)) < EXACT
    far = random_problem(4, 0.8, 0.8)
    weights = numpy_weights(far)
    assert (weights > 5).sum() > 30 and (weights < 1 / 5).sum() > 30
    untruncated = numpy_token_expectation(far, lambda p, _, m: p / m)
    assert error(token_expectation(far, **UNTRUNCATED), untruncated) < EXACT
    for cap in (5.0, 2.0):
        actual = token_expectation(far, truncation=cap, clip=False)
        references = {
            "truncated": lambda p, _, m, cap=cap: min(p / m, cap),
            "excess": lambda p, _, m, cap=cap: max(p / m - cap, 0.0),
            "two-sided": lambda p, _, m, cap=cap: np.clip(p / m, 1 / cap, cap),
            # What truncated importance sampling of the mismatch alone would give.
            "mismatch only": lambda p, old, m, cap=cap: min(old / m, cap) * p / old,
        }
        found = {name: numpy_token_expectation(far, w) for name, w in references.items()}
        assert error(actual, found["truncated"]) < EXACT
        assert error(untruncated - actual, found["excess"]) < EXACT
        for other in (untruncated, found["two-sided"], found["mismatch only"]):
            assert error(actual, other) > 0.01


@pytest.mark.fast
def test_mismatch_and_staleness_multiply_to_the_full_weight():
    """Eq. 5: π_old/μ_old corrects only the mismatch; the full weight does not depend on π_old."""
    both = random_problem(5, 0.4, 0.3)
    found = token_expectation(both, **UNTRUNCATED)
    product = numpy_token_expectation(both, lambda p, old, m: (old / m) * (p / old))
    assert error(found, product) < EXACT
    elsewhere = both._replace(logits_old=random_problem(6).logits)
    assert error(token_expectation(elsewhere, **UNTRUNCATED), found) < EXACT
    # If one of the two distances is zero, the mismatch weight is the full weight, or 1.
    for problem, same in (
        (random_problem(5, 0.4, 0.0), "full"),
        (random_problem(5, 0.0, 0.4), "none"),
    ):
        np.testing.assert_allclose(
            token_expectation(problem, weight="mismatch", **UNTRUNCATED),
            token_expectation(problem, weight=same, **UNTRUNCATED),
            atol=EXACT,
        )


@pytest.mark.fast
def test_estimators_are_what_their_names_say():
    problem = random_problem(4, 0.7, 0.6)
    weights = {
        "no IS": lambda p, old, m: 1.0,
        "mismatch IS": lambda p, old, m: old / m,
        "token IS": lambda p, old, m: p / m,
        "token IS, C=5": lambda p, old, m: min(p / m, 5.0),
        "token IS, C=2": lambda p, old, m: min(p / m, 2.0),
        # Rewards are 0 or 1 here, so that the clip's lower side has nothing to do.
        "MiniRL": lambda p, old, m: 0.0 if p / old > 1.27 else min(p / m, 5.0),
    }
    expected = {name: numpy_token_expectation(problem, w) for name, w in weights.items()}
    expected["sequence IS"] = tabular.true_gradient(problem)
    assert ESTIMATORS.keys() == expected.keys()
    for name, estimator in ESTIMATORS.items():
        found = expectation(problem, estimator(problem, problem.rewards))
        for other, reference in expected.items():
            assert (error(found, reference) < EXACT) == (name == other), (name, other)


@pytest.mark.fast
def test_a_baseline_moves_no_expectation_of_weighted_estimators():
    """E_μ[w_t ∇log π_θ(y_t|·)] = 0 holds with the full weight, not if truncated or missing."""
    problem = random_problem(7, 0.8, 0.3)
    raw, shifted = problem.rewards, problem.rewards - 0.7
    for estimator in (tabular.sequence_gradients, ESTIMATORS["token IS"]):
        moved, expected = (expectation(problem, estimator(problem, a)) for a in (shifted, raw))
        assert error(moved, expected) < EXACT
    for name in ("no IS", "mismatch IS", "token IS, C=2"):
        moved, expected = (
            expectation(problem, ESTIMATORS[name](problem, a)) for a in (shifted, raw)
        )
        assert error(moved, expected) > 0.01


@pytest.mark.parametrize("size", [2, 3])
def test_the_group_mean_turns_no_gradient(size):
    """Passes all groups of G responses through `centered`, `minirl` and `aggregate` as one batch.

    The mean contains the sample itself, and takes exactly the share 1/G of the gradient with it:
    E[ĝ] = (1 − 1/G) ∇J. Nothing else happens to direction or weights.
    """
    problem = random_problem(8, 0.5, 0.3, vocab_size=3, length=2)
    count = len(problem.tokens)
    groups = np.array(list(itertools.product(range(count), repeat=size)))
    probabilities = tabular.rollout_probabilities(problem)[groups].prod(-1)
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=EXACT)
    one_group = jnp.zeros(size, int)

    def loss(logits, group):
        batch = problem._replace(
            tokens=jnp.asarray(problem.tokens)[group], prefixes=jnp.asarray(problem.prefixes)[group]
        )
        tables = (logits, problem.logits_old, problem.logits_rollout)
        advantages = centered(jnp.asarray(problem.rewards)[group], one_group)
        mask = jnp.ones(batch.tokens.shape, bool)
        logps = (tabular.log_probs(table, batch) for table in tables)
        total, rows = aggregate(minirl(*logps, advantages, mask, **UNTRUNCATED).loss, mask)
        return total / rows

    with jax.enable_x64(True):
        gradients = -jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(problem.logits, groups)
        advantages = jax.vmap(lambda rewards: centered(rewards, one_group))(problem.rewards[groups])
        gradients, advantages = np.asarray(gradients), np.asarray(advantages)
    shrunk = 1 - 1 / size
    token_level = np.tensordot(probabilities, gradients, 1)
    assert error(token_level, shrunk * token_expectation(problem, **UNTRUNCATED)) < EXACT
    units = tabular.sequence_gradients(problem, np.ones(count))
    samples = (advantages[..., None, None] * units[groups]).mean(1)
    sequence_level = np.tensordot(probabilities, samples, 1)
    assert error(sequence_level, shrunk * tabular.true_gradient(problem)) < EXACT


# Bias, cosine and noise as an independent program measured them: V = 6, T = 3, means of 8 random
# problems of its own, to the digits printed.
COLUMNS = ("no IS", "token IS", "token IS, C=2", "sequence IS")
SAME = "0.000 1.000 7.98"
INDEPENDENT = {
    0.0: [SAME, SAME, SAME, SAME],
    0.05: ["0.064 0.998 7.98", "0.055 0.998 7.99", "0.055 0.998 7.99", "0.000 1.000 8.01"],
    0.2: ["0.258 0.969 7.98", "0.218 0.976 8.11", "0.218 0.976 8.11", "0.000 1.000 8.35"],
    0.5: ["0.643 0.839 8.01", "0.536 0.887 8.79", "0.538 0.885 8.47", "0.000 1.000 10.5"],
    1.0: ["1.26 0.582 8.06", "1.02 0.722 12.1", "0.964 0.686 8.12", "0.000 1.000 23.7"],
}


def agrees(interval, theirs, seeds):
    """Returns True if a mean over 8 problems is a plausible draw, given ours over `seeds` others.

    Half-widths shrink as 1/√n: the difference of the two means has the variance 1/n + 1/8.
    """
    half = (interval.high - interval.low) / 2 * np.sqrt(1 + seeds / 8)
    rounding = 0.5 * 10.0 ** -len(theirs.partition(".")[2])
    return bool(abs(interval.value - float(theirs)) <= half + rounding)


def test_table_of_an_independent_program():
    """That program used standard normal logits, fair-coin rewards and centred rewards."""
    seeds = 32
    columns = {name: ESTIMATORS[name] for name in COLUMNS}
    rows = tabular.table(INDEPENDENT, estimators=columns, seeds=range(seeds))
    assert [(r.mismatch, r.estimator) for r in rows] == list(
        itertools.product(INDEPENDENT, COLUMNS)
    )
    failures = 0
    for row, theirs in zip(rows, itertools.chain(*INDEPENDENT.values())):
        figures = [row.bias, row.cosine, row.noise]
        verdicts = [agrees(f, p, seeds) for f, p in zip(figures, theirs.split(), strict=True)]
        shown = "  ".join(f"{f.value:7.3f} [{f.low:7.3f}, {f.high:7.3f}]" for f in figures)
        print(f"{row.mismatch:<5} {row.estimator:14} {shown}   theirs {theirs} {verdicts}")
        failures += verdicts.count(False)
    assert not failures
    for row in rows[COLUMNS.index("sequence IS") :: len(COLUMNS)]:
        assert row.bias.high < EXACT
    # Its explosion with length: 4 steps at σ = 1.
    (row,) = tabular.table(
        (1.0,), estimators={"sequence IS": columns["sequence IS"]}, seeds=range(seeds), length=4
    )
    assert agrees(row.noise, "51.4", seeds)
    # Without centring the reward, the estimator gives other figures.
    uncentered = {"no IS": lambda problem, _: columns["no IS"](problem, problem.rewards)}
    (row,) = tabular.table((0.2,), estimators=uncentered, seeds=range(seeds))
    assert not agrees(row.bias, ".258", seeds) and not agrees(row.noise, "7.98", seeds)


@pytest.mark.fast
def test_table_splits_the_distance_and_reports_intervals():
    seen = []

    def constant(problem, advantages):
        """Returns gradients with a bias of 1, and records its arguments."""
        seen.append((problem, advantages))
        return np.full((len(advantages), *problem.logits.shape), 1e-100)

    rows = tabular.table((0.0, 0.3), (0.1, 0.2), {"a": constant}, (4, 9), vocab_size=3, length=2)
    pairs = [(0.0, 0.1), (0.0, 0.2), (0.3, 0.1), (0.3, 0.2)]
    assert [(row.mismatch, row.staleness) for row in rows] == pairs
    for (problem, advantages), (pair, seed) in zip(seen, itertools.product(pairs, (4, 9))):
        jax.tree.map(np.testing.assert_array_equal, problem, random_problem(seed, *pair, 3, 2))
        mean = tabular.rollout_probabilities(problem) @ problem.rewards
        np.testing.assert_allclose(advantages, problem.rewards - mean, atol=EXACT)
    np.testing.assert_allclose(dataclasses.astuple(rows[0].bias), 1.0)


@pytest.mark.fast
def test_problems_differ_only_in_what_is_asked():
    near, far = random_problem(0, 0.1, 0.2), random_problem(0, 0.3, 0.4)
    for field in ("tokens", "prefixes", "rewards", "logits"):
        np.testing.assert_array_equal(getattr(near, field), getattr(far, field))
    noise = [
        ((p.logits_old - p.logits) / s, (p.logits_rollout - p.logits_old) / m)
        for p, m, s in ((near, 0.1, 0.2), (far, 0.3, 0.4))
    ]
    np.testing.assert_allclose(noise[0], noise[1], atol=1e-12)
    assert np.abs(np.corrcoef(np.reshape(noise[0], (2, -1)))[0, 1]) < 0.2
    assert not np.array_equal(near.logits, random_problem(1).logits)


@pytest.mark.fast
def test_float64_is_kept_where_it_is_asked_for_only():
    inputs = [np.full((2, 3), -x) for x in (1.0, 1.1, 1.2)] + [np.ones(2), np.ones((2, 3), bool)]
    for wanted in (jnp.float32, jnp.float64):
        with jax.enable_x64(wanted == jnp.float64):
            out = jax.eval_shape(minirl, *inputs)
            assert out.loss.dtype == out.weight.dtype == out.log_weight.dtype == wanted
            assert jax.eval_shape(aggregate, out.loss, inputs[-1])[0].dtype == wanted
            assert jax.eval_shape(centered, inputs[3], np.zeros(2, int)).dtype == wanted
            half = jax.eval_shape(minirl, *(x.astype(jnp.bfloat16) for x in inputs[:4]), inputs[4])
            assert half.loss.dtype == half.weight.dtype == jnp.float32
    problem = random_problem(0)
    assert tabular.true_gradient(problem).dtype == np.float64
    assert jnp.zeros(1).dtype == jnp.float32  # the process is unchanged
