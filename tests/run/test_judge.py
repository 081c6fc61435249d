"""From tokens to rewards: decoding, verdicts, missing verdicts, and evaluation."""

from functools import partial

import numpy as np
import pytest

from jaxrl_stable import advantages as estimators
from jaxrl_stable import configs
from jaxrl_stable.rewards import Reward, Verdict
from jaxrl_stable.run.evaluation import Result, make_sampler
from jaxrl_stable.run.judge import (
    STATUSES,
    Judged,
    advantage_inputs,
    failed_share,
    judge,
    reward_metrics,
)
from jaxrl_stable.run.programs import make_programs
from jaxrl_stable.run.task import Task
from jaxrl_stable.sampler.rollout import Sampling


class Words:
    """A tokenizer whose token i is the text "<i>"."""

    vocab_size, pad_id, bos_id, eos_id, eos_ids = 32, 0, None, 2, (2, 3, 4)

    def encode(self, text):
        return [int(i) for i in text[1:-1].split("><")]

    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)

    def control_token(self, text):
        return None


@pytest.mark.fast
def test_responses_are_decoded_without_prompt_stop_token_and_padding(trajectory):
    seen = []

    def reward(problems, responses):
        seen.extend(responses)
        return [Verdict(1.0, "ok")] * len(responses)

    rows = 10  # the others are padding rows
    judged = judge(Task([], [], Words(), Reward("test", reward)), [{}] * rows, trajectory)
    P = trajectory.prompt_width
    for i in range(rows):
        sampled = [int(t) for t in trajectory.tokens[i, P:]]
        length = int(trajectory.response_mask[i].sum())
        expected = sampled[: length - int(trajectory.finished[i])]
        assert seen[i] == "".join(f"<{t}>" for t in expected)
        assert judged.lengths[i] == length
    assert len(seen) == len(judged.rewards) == rows
    np.testing.assert_array_equal(judged.finished, trajectory.finished[:rows])
    assert not judged.unknown.any()


@pytest.mark.fast
def test_ids_that_the_tokenizer_does_not_have_are_counted(trajectory):
    """Only those that were sampled count, not those in prompts."""

    class Fewer(Words):
        vocab_size, gaps = 30, {7}

    unknown = [7, 30, 31]
    reward = Reward("test", lambda problems, responses: [Verdict(1.0, "ok")] * len(responses))
    judged = judge(Task([], [], Fewer(), reward), [{}] * 8, trajectory)
    tokens, mask = (np.asarray(x)[:8] for x in (trajectory.tokens, trajectory.response_mask))
    expected = (np.isin(tokens, unknown) & mask).sum(-1)
    assert expected.sum() and (np.isin(tokens, unknown) & ~mask).any()
    np.testing.assert_array_equal(judged.unknown, expected)
    metrics = reward_metrics(judged, group_size=2)
    assert metrics["response/unknown_share"] == pytest.approx(expected.sum() / mask.sum())
    assert reward_metrics(judged._replace(unknown=None), 2)["response/unknown_share"] == 0


@pytest.mark.fast
def test_special_tokens_are_shown_to_the_reward_only_if_asked_for(trajectory):
    asked = []

    class Special(Words):
        def decode(self, ids, special_tokens=False):
            asked.append(special_tokens)
            return super().decode(ids)

    unused = Reward("test", lambda problems, responses: [])
    for shown in (False, True):
        task = Task([], [], Special(), unused, special_tokens=shown)
        task.decode(trajectory.tokens[:1], trajectory.response_mask[:1])
    assert asked == [False, True]


def judged_of(scores, statuses):
    n = len(scores)
    return Judged(
        np.array(scores, np.float32),
        np.array([STATUSES.index(status) for status in statuses]),
        np.arange(1, n + 1),
        np.array([True] * (n - 1) + [False]),
    )


@pytest.mark.fast
def test_reward_metrics_by_hand():
    scores = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    statuses = ["ok", "invalid", "ok", "timeout", "ok", "ok"]
    got = reward_metrics(judged_of(scores, statuses), group_size=2)
    assert got["reward/mean"] == pytest.approx(3 / 5)  # the timeout is left out
    assert got["reward/accuracy"] == pytest.approx(3 / 5)
    assert got["reward/failed_share"] == pytest.approx(1 / 6)
    assert got["reward/invalid_share"] == pytest.approx(1 / 6)
    assert got["reward/zero_variance_share"] == pytest.approx(1 / 3)  # (1, –) has one score only
    assert got["response/length"] == pytest.approx(3.5)
    assert got["response/tokens"] == 21
    assert got["response/truncated_share"] == pytest.approx(1 / 6)


@pytest.mark.fast
def test_rewards_of_a_rollout_are_absent_if_none_is_known():
    got = reward_metrics(judged_of([0.0, 0.0], ["timeout", "error"]), group_size=2)
    assert not {"reward/mean", "reward/accuracy"} & got.keys()
    assert got["reward/failed_share"] == 1


@pytest.mark.fast
def test_accuracy_counts_from_the_score_that_the_reward_calls_right():
    judged = judged_of([7.0, 9.0, 10.0, 1.0], ["ok"] * 4)
    assert reward_metrics(judged, 2, right_at=9)["reward/accuracy"] == 0.5
    assert reward_metrics(judged, 2)["reward/accuracy"] == 1.0


def evaluated(scores, **fields):
    scores = np.array(scores)
    shape = scores.shape
    return Result(scores, np.ones(shape, int), np.ones(shape, bool), scores == 0, **fields)


@pytest.mark.fast
def test_evaluation_leaves_out_failed_checkers_and_says_so():
    metrics = evaluated([[1.0, 0.0], [np.nan, 1.0], [0.0, 0.0], [np.nan, np.nan]]).metrics()
    assert metrics["eval/avg_at_k"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["eval/pass_at_k"] == pytest.approx((1 + 0) / 2)  # two judged samples are needed
    assert metrics["eval/failed_share"] == pytest.approx(3 / 8)
    assert metrics["eval/invalid_share"] == pytest.approx(3 / 8)
    assert metrics["eval/avg_at_k_low"] <= metrics["eval/avg_at_k"] <= metrics["eval/avg_at_k_high"]


@pytest.mark.fast
def test_graded_rewards_have_a_mean_with_an_interval_and_their_own_threshold():
    result = evaluated([[0.3, 0.9], [0.9, 0.9]], right_at=0.9)
    metrics = result.metrics()
    assert metrics["eval/reward"] == pytest.approx(0.75)
    assert metrics["eval/reward_low"] == pytest.approx(0.6)
    assert metrics["eval/avg_at_k"] == pytest.approx(0.75)
    assert metrics["eval/pass_at_k"] == 1
    assert evaluated([[0.3, 0.9], [0.9, 0.9]]).metrics()["eval/avg_at_k"] == 0


@pytest.mark.fast
def test_checkpoints_are_ranked_by_the_named_metric_of_a_judged_evaluation():
    result = evaluated([[0.0, 2.0], [np.nan, 0.0]])
    assert result.score("reward", max_failed=0.25) == pytest.approx(0.5)
    assert result.score("avg_at_k", max_failed=0.25) == pytest.approx(0.25)
    assert result.score("pass_at_k", max_failed=0.25) == 1
    assert result.score("reward", max_failed=0.2) is None
    nothing = evaluated([[np.nan, np.nan]])
    assert nothing.score("reward", max_failed=1.0) is None
    assert "eval/reward" not in nothing.metrics() and nothing.metrics()["eval/failed_share"] == 1


@pytest.mark.fast
def test_evaluation_samples_with_its_own_settings():
    task = Task([], [], Words(), Reward("test", lambda problems, responses: []))
    own = configs.Evaluation(max_tokens=7, top_k=3, top_p=0.5, temperature=0.25)
    sampling = make_sampler(task, own, 5).__wrapped__.keywords["sampling"]
    assert (sampling.max_tokens, sampling.top_k, sampling.top_p) == (7, 3, 0.5)
    assert sampling.temperature == 0.25
    usual = make_sampler(task, configs.Evaluation(), 5).__wrapped__.keywords["sampling"]
    assert (usual.max_tokens, usual.top_k) == (5, 0)
    with pytest.raises(ValueError, match=r"Evaluation\.best is 'loss'; use one of 'reward'"):
        configs.Evaluation(best="loss")


@pytest.mark.fast
def test_overlong_responses_are_punished_or_filtered():
    """Limit 8, of which the last half punishes; the fourth response was cut off at the limit."""
    judged = judged_of([1, 0, 1, 1], ["ok"] * 4)._replace(lengths=np.array([4, 6, 7, 8]))
    make = partial(configs.Reinforcement, prompts=2, group_size=2, max_tokens=8, micro_batch_size=1)
    objective = configs.Objective(mini_batches=1)
    found = advantage_inputs(make(objective=objective), judged)
    kept, scores, penalty, groups, valid, lengths = found
    np.testing.assert_array_equal(scores, judged.rewards)
    assert not penalty.any()
    assert kept.all() and groups.tolist() == [0, 0, 1, 1]
    assert valid.all() and lengths is judged.lengths
    rl = make(objective=objective, overlong_buffer=0.5, overlong_filter=True)
    kept, scores, penalty, *_ = advantage_inputs(rl, judged)
    np.testing.assert_array_equal(scores, judged.rewards)
    np.testing.assert_allclose(scores + penalty, [1, -0.5, 0.25, 0])
    assert kept.tolist() == [True, True, True, False]
    advantages = make_programs(rl, Sampling(rl.max_tokens)).advantages
    got = advantages(*advantage_inputs(rl, judged))
    np.testing.assert_allclose(got, [0.75, -0.75, 0.125, 0], atol=1e-6)
    with pytest.raises(ValueError, match="overlong_buffer is 2; it is a share of max_tokens"):
        make(objective=objective, overlong_buffer=2)


def informative_groups(judged, finished=None, **settings):
    """Which groups of a run with these settings are informative; pairs unless `group_size` says."""
    objective = configs.Objective(
        mini_batches=1, advantages=settings.pop("advantages", estimators.centered)
    )
    size = settings.pop("group_size", 2)
    rl = configs.Reinforcement(
        prompts=len(judged.rewards) // size,
        group_size=size,
        max_tokens=8,
        micro_batch_size=1,
        objective=objective,
        **settings,
    )
    if finished is not None:
        judged = judged._replace(finished=np.array(finished))
    marked = make_programs(rl, Sampling(rl.max_tokens)).informative(*advantage_inputs(rl, judged))
    return np.asarray(marked).tolist()


@pytest.mark.fast
def test_groups_whose_responses_are_all_cut_teach_nothing():
    """With the overlong filter; a group in which only the average response is left neither."""
    judged = judged_of([1, 0, 1, 0, 1, 1], ["ok"] * 6)
    finished = [False, False, True, False, True, True]
    assert informative_groups(judged, finished) == [True, True, False]
    assert informative_groups(judged, finished, overlong_filter=True) == [False, True, False]
    judged = judged_of([1, 0.5, 0], ["ok"] * 3)
    finished = [False, True, False]
    three = dict(overlong_filter=True, group_size=3)
    assert informative_groups(judged, finished, **three) == [False]
    leave_one_out = partial(estimators.leave_one_out, standardize=True)
    assert informative_groups(judged, [True] * 3, advantages=leave_one_out, **three) == [True]


@pytest.mark.fast
def test_missing_rewards_and_length_penalties_teach_nothing():
    judged = judged_of([1, 0, 1, 0], ["ok", "timeout", "ok", "ok"])
    assert informative_groups(judged) == [False, True]
    assert informative_groups(judged_of([1, 0], ["error", "error"])) == [False]
    judged = judged_of([0] * 4, ["ok"] * 4)._replace(lengths=np.array([4, 8, 4, 8]))
    for advantages in (estimators.centered, estimators.gpg):
        settings = dict(overlong_buffer=0.5, advantages=advantages)
        assert informative_groups(judged, **settings) == [False, False]
        right = judged._replace(rewards=np.array([0, 0, 0, 1], np.float32))  # equal when punished
        assert informative_groups(right, **settings) == [False, True]


@pytest.mark.fast
def test_equal_scores_are_informative_only_if_the_batch_is_the_baseline():
    """Whitening by tokens gives a group of equal scores an advantage that teaches nothing."""
    judged = judged_of([1, 1, 1, 0], ["ok"] * 4)
    whitened = estimators.reinforce_plus_plus
    grouped = np.asarray(whitened(judged.rewards, np.array([0, 0, 1, 1]), None, judged.lengths))
    assert grouped[:2].all()
    assert informative_groups(judged, advantages=whitened) == [False, True]
    whole = dict(advantages=partial(whitened, baseline=False))
    assert informative_groups(judged, **whole) == [True, True]
    assert informative_groups(judged, group_size=1, **whole) == [True] * 4
    equal = judged._replace(rewards=np.full(4, 0.1, np.float32))
    assert informative_groups(equal, group_size=1, **whole) == [False] * 4


@pytest.mark.fast
def test_a_penalty_is_taken_as_the_estimator_says():
    """gpg counts the one right answer, not the punished wrong ones: a factor of 4."""
    judged = judged_of([1, 0, 0, 0], ["ok"] * 4)._replace(lengths=np.array([4, 8, 4, 6]))
    rl = configs.Reinforcement(
        prompts=2,
        group_size=2,
        max_tokens=8,
        micro_batch_size=1,
        overlong_buffer=0.5,
        objective=configs.Objective(mini_batches=1, advantages=estimators.gpg),
    )
    got = make_programs(rl, Sampling(8)).advantages(*advantage_inputs(rl, judged))
    np.testing.assert_allclose(got, [4, -4, 1, -1], rtol=1e-6)


@pytest.mark.fast
def test_valid_is_what_a_verdict_says():
    judged = judged_of([1, 0, 0, 0], STATUSES)
    failed = [Verdict(0.0, status).failed for status in STATUSES]
    np.testing.assert_array_equal(judged.valid, np.logical_not(failed))


@pytest.mark.fast
def test_failed_rewards_of_every_round_count():
    rounds = [judged_of([1, 0], ["ok", "timeout"]), judged_of([1, 0], ["ok", "ok"])]
    assert failed_share(rounds) == 0.25
