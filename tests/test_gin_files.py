"""How gin files, the command line and functions bound by reference become an experiment."""

import pathlib
import sys

import pytest

from jaxrl_stable import gin_files
from jaxrl_stable.gin_files import load_experiment
from jaxrl_stable.objectives import cispo, gspo, minirl

ROOT = pathlib.Path(__file__).parents[1]
TINY = str(pathlib.Path(__file__).with_name("experiment.gin"))
RECIPES = ROOT / "experiments" / "recipes"


def objective(*bindings, files=(TINY,)):
    return load_experiment(list(map(str, files)), bindings).reinforcement.objective


@pytest.mark.fast
def test_options_without_naming_the_loss():
    """MiniRL is bound by reference unless another loss is, so that its options can be bound."""
    assert objective().loss is minirl
    bound = objective("objectives.minirl.truncation=2.0").loss
    assert bound.func is minirl and bound.keywords == {"truncation": 2.0}


@pytest.mark.fast
def test_files_that_wire_nothing():
    assert load_experiment([], ["configs.Experiment.seed = 3"]).seed == 3


@pytest.mark.fast
def test_two_experiments_in_one_process_keep_their_options():
    one = objective("objectives.minirl.truncation=7.0")
    other = objective("configs.Objective.loss=@objectives.gspo", "objectives.gspo.clip_low=1e-3")
    assert one.loss.keywords == {"truncation": 7.0} and other.loss.keywords == {"clip_low": 1e-3}


@pytest.mark.fast
def test_what_ran_names_the_options_that_were_not_bound():
    objective("objectives.minirl.truncation=7.0")
    resolved = gin_files.resolved_config()
    assert "objectives.minirl.truncation = 7.0" in resolved
    if not hasattr(minirl, "__wrapped__"):  # gin does not see the defaults of a checked function
        assert "objectives.minirl.clip_high = 0.27" in resolved
    assert "configs.Objective.loss = @objectives.minirl" in resolved


@pytest.mark.fast
def test_a_later_file_may_orphan_what_an_earlier_one_bound(tmp_path):
    switch = tmp_path / "switch.gin"
    switch.write_text(
        "from __gin__ import dynamic_registration\nfrom jaxrl_stable import objectives\n"
        "objectives.minirl.clip = False\n"
    )
    assert objective(files=[TINY, switch, RECIPES / "gspo.gin"]).loss.func is gspo
    assert objective(files=[TINY, RECIPES / "dapo.gin", RECIPES / "cispo.gin"]).loss.func is cispo
    with pytest.raises(ValueError, match=r"objectives\.minirl\.clip is bound but nothing uses it"):
        objective(files=[TINY, RECIPES / "gspo.gin", switch])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["objectives.gspo.clip_low=1e-3"], "bind @objectives.gspo where it belongs"),
        (["objectives.minirl.clip_hgih=1.0"], "doesn't have a parameter named 'clip_hgih'"),
        (["objectives.minirl.clip_low=1.2"], "clip_low=1.2"),
        (["configs.Objective.loss=@objectives.gpso"], "gpso"),
        (["configs.Objective.loss=@x/objectives.gspo"], "gspo has a scope"),
        (["configs.Objective.corrections=[@corrections.token_tis]"], "each weight by the mismatch"),
    ],
    ids=str,
)
def test_mistakes(bindings, message):
    with pytest.raises(ValueError, match=message) as error:
        objective(*bindings)
    assert "\n" not in str(error.value) and "In call to" not in str(error.value)


@pytest.mark.fast
def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(
        "from jaxrl_stable.objectives import reinforce\n"
        "def louder(*arrays, gain=1.0):\n"
        "    out = reinforce(*arrays)\n"
        "    return out._replace(loss=gain * out.loss)\n"
        "def broken(*arrays):\n"
        "    return {}['key']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = "import own_losses", "configs.Objective.loss=@own_losses.louder"
    assert objective(*own, "own_losses.louder.gain=0.5").loss.keywords == {"gain": 0.5}
    with pytest.raises(ValueError, match="broken raised KeyError: 'key'"):
        objective("import own_losses", "configs.Objective.loss=@own_losses.broken")
    sys.modules.pop("own_losses")
