"""Dynamic sampling: later rounds replace groups that give no gradient."""

import jax
import numpy as np
import pytest

from jaxrl_stable.routing import Routing
from jaxrl_stable.run.dynamic_sampling import Round, collect
from jaxrl_stable.run.judge import STATUSES, Judged, scores_differ
from jaxrl_stable.trajectory import Trajectory, fill_rows

G, T, L, K = 2, 5, 3, 2


def make_round(number, scores, valid=None):
    """Returns a round in which everything in row i is 100 · number + i."""
    scores = np.asarray(scores, np.float32)
    ids = 100 * number + np.arange(len(scores))
    column = np.repeat(ids[:, None], T, 1)
    experts = np.broadcast_to(ids[None, :, None, None], (L, len(ids), T, K)).astype(np.uint16)
    trajectory = Trajectory(
        tokens=column,
        real=column % 2 == 0,
        response_mask=column % 2 == 1,
        logp_rollout=column.astype(np.float32),
        routing=Routing(experts, column % 2 == 0),
        finished=ids % 2 == 0,
        prompt_width=2,
    )
    valid = np.ones(len(ids), bool) if valid is None else np.asarray(valid)
    judged = Judged(
        scores,
        np.where(valid, STATUSES.index("ok"), STATUSES.index("timeout")),
        ids,
        ids % 2 == 0,
        ids,
    )
    return Round(ids, trajectory, judged)


def run(rounds, max_rounds=9):
    drawn = []

    def draw(number):
        drawn.append(number)
        return rounds[number]

    def informative(judged):
        return scores_differ(judged, G) & judged.finished.reshape(-1, G).any(-1)

    batch, verdicts = collect(draw, jax.jit(fill_rows), informative, G, max_rounds)
    assert drawn == list(range(len(verdicts)))
    return batch, len(verdicts)


@pytest.mark.fast
def test_rows_of_a_later_round_move_together():
    rounds = [
        make_round(0, [1, 0, 1, 1, 0, 0, 0, 1]),  # groups 1 and 2 are uninformative
        make_round(1, [0, 0, 0, 0, 0, 0, 1, 0]),  # its last group is informative
        make_round(2, [1, 0, 0, 1, 0, 1, 1, 0]),  # more than is needed
    ]
    batch, drawn = run(rounds)
    assert drawn == 3
    rows = [0, 1, 106, 107, 200, 201, 6, 7]
    assert batch.index.tolist() == rows
    np.testing.assert_array_equal(batch.judged.lengths, rows)
    np.testing.assert_array_equal(batch.judged.unknown, rows)
    np.testing.assert_array_equal(batch.judged.rewards, [1, 0, 1, 0, 1, 0, 0, 1])
    trajectory = batch.trajectory
    np.testing.assert_array_equal(np.asarray(trajectory.tokens)[:, 0], rows)
    np.testing.assert_array_equal(np.asarray(trajectory.logp_rollout)[:, 3], rows)
    np.testing.assert_array_equal(np.asarray(trajectory.routing.experts)[1, :, 2, 0], rows)
    np.testing.assert_array_equal(trajectory.finished, np.asarray(rows) % 2 == 0)
    np.testing.assert_array_equal(np.asarray(trajectory.routing.valid)[:, 1], trajectory.finished)
    assert trajectory.prompt_width == 2


@pytest.mark.fast
def test_one_round_changes_nothing():
    first = make_round(0, [1, 1, 0, 1])
    batch, drawn = run([first], max_rounds=1)
    assert drawn == 1
    for a, b in zip(jax.tree.leaves(batch.trajectory), jax.tree.leaves(first.trajectory)):
        assert a is b


@pytest.mark.fast
def test_it_gives_up_and_keeps_what_it_has():
    batch, drawn = run([make_round(i, [1, 1, 0, 0]) for i in range(3)], max_rounds=3)
    assert drawn == 3 and batch.index.tolist() == [0, 1, 2, 3]


@pytest.mark.fast
def test_the_run_decides_what_is_informative():
    """Scores that differ are not enough: here a group needs a finished response as well."""
    cut = make_round(0, [1, 0, 1, 0])
    cut = cut._replace(judged=cut.judged._replace(finished=np.array([False, False, True, True])))
    batch, drawn = run([cut, make_round(1, [1, 1, 0, 1])])
    assert drawn == 2 and batch.index.tolist() == [102, 103, 2, 3]


@pytest.mark.fast
def test_missing_rewards_make_no_difference_of_scores():
    judged = make_round(0, [1, 0, 1, 0], [True, False, True, True]).judged
    assert scores_differ(judged, G).tolist() == [False, True]
    none = judged._replace(status=np.full(4, STATUSES.index("error")))
    assert not scores_differ(none, G).any()
