"""The cold start: its loss by hand, packing, and learning."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.configs import Optimizer
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.trainer.optimizer import init_state, make_optimizer
from jaxrl_stable.trainer.supervised import supervised_update


def packed(rows):
    """Returns rows of (prompt length, answer length) pairs, packed side by side in 16 columns."""
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(4, 32, (len(rows), 16)),
        "segment_ids": np.zeros((len(rows), 16), np.int32),
        "positions": np.zeros((len(rows), 16), np.int32),
        "loss_mask": np.zeros((len(rows), 16), bool),
    }
    for i, row in enumerate(rows):
        start = 0
        for segment, (prompt, answer) in enumerate(row, 1):
            stop = start + prompt + answer
            batch["segment_ids"][i, start:stop] = segment
            batch["positions"][i, start:stop] = np.arange(stop - start)
            batch["loss_mask"][i, start + prompt : stop] = True
            start = stop
    return batch


@pytest.fixture(scope="module")
def step():
    optimizer = make_optimizer(Optimizer(learning_rate=3e-3, clip_norm=1e9))
    return optimizer, jax.jit(partial(supervised_update, optimizer=optimizer))


@pytest.mark.fast
def test_loss_is_the_mean_over_answer_tokens_of_separate_examples(model, step):
    optimizer, update = step
    rows = [[(3, 4), (2, 5)], [(6, 6)]]
    batch = packed(rows)
    _, metrics = update(init_state(model, optimizer), batch)
    total, count = 0.0, 0
    for i, row in enumerate(rows):
        start = 0
        for prompt, answer in row:
            tokens = jnp.asarray(batch["tokens"][i : i + 1, start : start + prompt + answer])
            length = tokens.shape[1]
            hidden = model(tokens, jnp.arange(length)[None], jnp.ones_like(tokens)).hidden
            logits = np.asarray(hidden[0] @ model.head_weight(), np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for t in range(prompt, length):
                total -= logp[t - 1, int(tokens[0, t])]
                count += 1
            start += length
    np.testing.assert_allclose(finalize(metrics)["sft/loss"], total / count, rtol=1e-5)


def test_it_learns(model, step):
    optimizer, update = step
    batch, state = packed([[(3, 4), (2, 5)], [(6, 6)]]), init_state(model, optimizer)
    losses = []
    for _ in range(30):
        state, metrics = update(state, batch)
        losses.append(float(finalize(metrics)["sft/loss"]))
    assert losses[-1] < 0.2 * losses[0]
