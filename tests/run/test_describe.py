"""What a run says about itself before it starts."""

import pathlib

import pytest

from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.model import tiny
from jaxrl_stable.objective import Objective
from jaxrl_stable.run.describe import describe, implementations, recommendation, sampler_products

ROOT = pathlib.Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "experiment.gin")
RECIPES = ROOT / "experiments" / "recipes"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("n", "replay", "expected"),
    [
        (1, "none", ("no replay", "the same replay")),
        (2, "R2", ("clipping, R2", "the same replay")),
        (4, "R2", ("clipping, R3", "replay 'R2'")),
        (8, "R3", ("clipping, R3", "the same replay")),
    ],
)
def test_the_papers_advice_for_this_many_updates(n, replay, expected):
    advice = recommendation(Objective(mini_batches=n, replay=replay), moe_layers=2)
    assert all(part in advice for part in expected), advice
    assert "no experts" in recommendation(Objective(mini_batches=n, replay=replay), moe_layers=0)


@pytest.mark.fast
def test_a_dry_run_says_what_is_minimised():
    experiment = load_experiment([TINY, str(RECIPES / "grpo.gin")])
    text = describe(experiment)
    assert "ppo, standardized, seq-mean-token-mean" in text and "the paper at N = 4" in text
    assert "reference policy" in text
    assert "reference policy" not in describe(load_experiment([TINY]))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        ([], "random weights (seed 0), then 8 supervised steps"),
        (["init_from='a/b'"], "a/b, then 8 supervised steps"),
        (["init_from='a/b'", "cold_start=None"], "a/b"),
        (["cold_start=None", "seed=3"], "random weights (seed 3)"),
    ],
)
def test_a_dry_run_says_what_a_run_starts_from(bindings, expected):
    experiment = load_experiment([TINY], [f"configs.Experiment.{line}" for line in bindings])
    (line,) = [line for line in describe(experiment).splitlines() if line.startswith("starts from")]
    assert line.removeprefix("starts from").strip() == expected


@pytest.mark.fast
@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("int8", "sampler int8, "),
        ("fp8_w8a8", "sampler fp8_w8a8 with emulated products, "),
    ],
)
def test_what_runs_names_the_products_of_the_sampler(format, expected):
    bindings = [f"configs.Reinforcement.rollout_format='{format}'"]
    experiment = load_experiment([TINY], bindings)
    assert expected in implementations(experiment)
    assert expected in describe(experiment)


@pytest.mark.fast
def test_grouped_kernels_emulate_what_other_products_do_natively(monkeypatch):
    monkeypatch.setattr("jaxrl_stable.run.describe.resolve_products", lambda format: "native")
    assert sampler_products(tiny(experts="blocked"), "int8_w8a8") == "native"
    assert sampler_products(tiny(experts="tokamax"), "int8_w8a8") == "native (experts: emulated)"
