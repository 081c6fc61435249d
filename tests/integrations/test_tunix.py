"""Tunix's own GRPO learner with our losses: it logs their values on its batches."""

import re

import flax
import numpy as np
import pytest
from flax import nnx

from tests.integrations.outside import EXAMPLES, example, minirl_loss

PAD, EOS = 0, 1
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Tunix's own, in hundreds


@pytest.fixture(scope="module")
def tunix():
    """Returns the example; restores a Flax flag that Tunix changes."""
    before = flax.config.flax_always_shard_variable
    yield example("tunix_minirl")
    flax.config.update("flax_always_shard_variable", before)


@nnx.jit
def forward(model, ids, positions, seen):
    return model(ids, positions, None, seen)[0]


def log_probs(model, batch):
    """log π of the completion, from the bare model: own positions and mask, NumPy in float64."""
    ids = np.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
    real = ids != PAD
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    seen = np.tril(np.ones((ids.shape[1],) * 2, bool)) & real[:, None]
    logits = forward(model, ids, positions, seen)
    logits = np.asarray(logits, np.float64)[:, batch.prompt_ids.shape[1] - 1 : -1]
    log_normaliser = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, np.asarray(batch.completion_ids)[..., None], -1)[..., 0]
    return picked - log_normaliser


def trained(tunix, name, updates, monkeypatch):
    """Returns the logged losses and rewards, and the input of each update."""
    seen = []

    def update_actor(cluster, train_ds, *arguments):
        (batch,) = train_ds
        seen.append((batch, log_probs(cluster.actor_trainer.model, batch)))
        return super(tunix.Cluster, cluster).update_actor(train_ds, *arguments)

    monkeypatch.setattr(tunix.Cluster, "update_actor", update_actor, raising=False)
    losses, rewards = tunix.train(name, updates)
    assert len(losses) == len(seen) == updates
    return np.asarray(losses), rewards, seen


def test_minirl_in_tunix(tunix, monkeypatch):
    losses, rewards, seen = trained(tunix, "minirl", 8, monkeypatch)
    expected, mismatch, shifted, staleness = [], [], [], []
    for batch, logp in seen:
        old, rollout = (
            np.asarray(batch.old_per_token_logps),
            np.asarray(batch.rollout_per_token_logps),
        )
        mask, advantages = np.asarray(batch.completion_mask), np.asarray(batch.advantages)
        expected.append(minirl_loss(logp, old, rollout, advantages, mask))
        mismatch.append(np.abs(old - rollout)[mask].max())
        shifted.append(np.abs(old[:, 1:] - rollout[:, :-1])[mask[:, 1:]].max())
        staleness.append(np.abs(logp - old)[mask].max())
        assert not np.isin(batch.completion_ids, EOS).any()  # see the README of the examples
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    # The sampler's log-probabilities arrive, at the tokens that they belong to.
    assert max(mismatch) < 1e-4 < 0.1 < min(shifted)
    assert max(staleness[::2]) < 1e-4 and min(staleness[1::2]) > 1e-2  # two updates per rollout
    assert rewards[-1] > rewards[0] + 0.2


@pytest.mark.parametrize(
    ("name", "mode"), [("gspo", "seq-mean-token-mean"), ("cispo", "token-mean")]
)
def test_others_by_the_same_signature(tunix, name, mode, monkeypatch):
    losses, _, seen = trained(tunix, name, 2, monkeypatch)
    for loss, (batch, logp) in zip(losses, seen):
        others = (batch.old_per_token_logps, batch.rollout_per_token_logps, batch.advantages)
        logp = tunix.jnp.asarray(logp, tunix.jnp.float32)
        out = getattr(tunix, name)(logp, *others, batch.completion_mask)
        total, count = tunix.aggregate(out.loss, batch.completion_mask, mode)
        np.testing.assert_allclose(loss, total / count, atol=1e-5)


def test_ten_lines_of_the_readme(tunix, monkeypatch):
    """In Tunix's stock learner, where the sampler's log-probabilities are missing."""
    section = (EXAMPLES / "README.md").read_text().split("## Tunix in ten lines")[1]
    code, imports = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    assert len(code.splitlines()) == 10
    names = {}
    exec(imports + code.replace('"minirl"', '"ten_lines"'), names)
    monkeypatch.setattr(tunix, "Learner", tunix.grpo_learner.GRPOLearner)
    losses, _, seen = trained(tunix, "ten_lines", 2, monkeypatch)
    for loss, (batch, logp) in zip(losses, seen):
        assert not hasattr(batch, "rollout_per_token_logps")
        old, mask = np.asarray(batch.old_per_token_logps), np.asarray(batch.completion_mask)
        expected = minirl_loss(logp, old, old, np.asarray(batch.advantages), mask)
        np.testing.assert_allclose(loss, expected, atol=1e-5)
