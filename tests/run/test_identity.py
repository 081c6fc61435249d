"""Which settings make a run, and which of them a resumed run may change."""

import dataclasses
import json

import pytest

from jaxrl_stable.configs import Data, Evaluation, Experiment, Optimizer, Reinforcement, Supervised
from jaxrl_stable.data import JsonlSource
from jaxrl_stable.rewards import Reward
from jaxrl_stable.run.identity import settings_of_run, settings_of_start

pytestmark = pytest.mark.fast

PROBLEMS = [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
EVALUATION = Evaluation(problems=3)
EXPERIMENT = Experiment(evaluation=EVALUATION)


def settings(experiment=EXPERIMENT, heldout=PROBLEMS, right_at=1.0):
    return settings_of_run(experiment, heldout, Reward("numeric", list, right_at=right_at))


def changed(**fields):
    return dataclasses.replace(EXPERIMENT, **fields)


def differing(ours, theirs):
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


COLD = Supervised(demonstrations=PROBLEMS)


@pytest.mark.parametrize(
    ("experiment", "names"),
    {
        "how often": (changed(evaluation=Evaluation(problems=3, every=7)), set()),
        "samples": (changed(evaluation=Evaluation(problems=3, samples=4)), {"Evaluation.samples"}),
        "heat": (
            changed(evaluation=Evaluation(problems=3, temperature=0.5)),
            {"Evaluation.temperature"},
        ),
        "rows": (
            changed(evaluation=Evaluation(problems=3, batch_size=4)),
            {"Evaluation.batch_size"},
        ),
        "rank": (changed(evaluation=Evaluation(problems=3, best="avg_at_k")), {"Evaluation.best"}),
        "problems": (
            changed(evaluation=Evaluation(problems=4)),
            {"Evaluation.problems", "Data.heldout"},
        ),
        "length": (changed(reinforcement=Reinforcement(max_tokens=8)), {"Evaluation.max_tokens"}),
        "own length": (
            changed(
                evaluation=Evaluation(problems=3, max_tokens=32),
                reinforcement=Reinforcement(max_tokens=8),
            ),
            set(),
        ),
        "reward": (changed(data=Data(reward="exact")), {"Data.reward"}),
        "patience": (changed(data=Data(reward_timeout=50.0, reward_workers=3)), set()),
        "training": (
            changed(reinforcement=Reinforcement(steps=7, optimizer=Optimizer(learning_rate=1.0))),
            set(),
        ),
        "origin": (changed(init_from="a/b"), {"Experiment.init_from"}),
    }.values(),
)
def test_what_may_change(experiment, names):
    assert differing(settings(), settings(experiment)) == names


def test_another_threshold_of_the_same_reward():
    assert differing(settings(), settings(right_at=0.5)) == {"right_at of the reward"}


def test_the_held_out_set_counts_by_content(tmp_path):
    """The file may move, and problems that are not evaluated may change."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    from_a_file = settings(heldout=JsonlSource(path))
    assert from_a_file == settings()
    assert settings(heldout=[*PROBLEMS[:3], {"prompt": "9?", "answer": "9"}]) == settings()
    other = [*PROBLEMS[:2], {"prompt": "2+1?", "answer": "4"}]
    assert differing(settings(), settings(heldout=other)) == {"Data.heldout"}
    assert differing(settings(), settings(heldout=[PROBLEMS[i] for i in (1, 0, 2)]))


def test_the_cold_start_is_part_of_a_run():
    one, none = changed(cold_start=COLD), settings()
    assert "Experiment.cold_start" in differing(none, settings(one))
    for fields, name in (
        ({"steps": 7}, "Supervised.steps"),
        ({"optimizer": Optimizer(learning_rate=1.0)}, "Supervised.optimizer.learning_rate"),
        ({"demonstrations": PROBLEMS[:1]}, "Supervised.demonstrations"),
        ({"checkpoint_every": 3}, None),
    ):
        other = changed(cold_start=dataclasses.replace(COLD, **fields))
        differ = differing(settings(one), settings(other))
        assert name in differ if name else not differ
    assert settings(one) == json.loads(json.dumps(settings(one)))


def test_demonstrations_that_are_gone_say_nothing(tmp_path):
    """A run that has started does not need them."""
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for given, files in ((str(path), 1), ([str(path), str(other)], 2)):
        for file in (path, other):
            file.write_text(json.dumps(PROBLEMS[0]) + "\n")
        experiment = changed(cold_start=Supervised(demonstrations=given))
        before = settings_of_start(experiment)
        content = before.pop("Supervised.demonstrations")
        assert content.count("crc32") == files and str(tmp_path) not in content
        path.unlink()
        assert settings_of_start(experiment) == before


def test_an_object_without_a_name_is_the_same_in_every_process():
    class Mine:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"prompt": "1+1?", "answer": "2"}

    assert settings_of_start(changed(cold_start=Supervised(demonstrations=Mine())))[
        "Supervised.demonstrations"
    ].endswith("Mine object>")


def test_the_path_of_an_origin_is_compared_as_a_path():
    assert settings_of_start(changed(init_from="a/./b/")) == settings_of_start(
        changed(init_from="a/b")
    )
