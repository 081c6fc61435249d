"""The loss inside an Equinox module, with filtered transformations, on the toy of `plain_jax.py`.

    python experiments/integrations/equinox_module.py        (needs `pip install equinox`)

As usual in Equinox, the module handles one token and `jax.vmap` adds the batch.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from plain_jax import VOCAB, WIDTH, collect, mini_batches, report, rollout, score

from jaxrl_stable.objectives import aggregate, minirl


class Policy(eqx.Module):
    """Logits of the next token, from the token before it."""

    embed: eqx.nn.Embedding
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        first, second = jax.random.split(key)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=first)
        self.mlp = eqx.nn.MLP(WIDTH, VOCAB, WIDTH, depth=1, activation=jnp.tanh, key=second)

    def __call__(self, previous: jax.Array) -> jax.Array:
        apply = lambda token: self.mlp(self.embed(token))  # noqa: E731
        for _ in previous.shape:  # [B] when sampling, [B, T] when scoring
            apply = jax.vmap(apply)
        return apply(previous)


optimizer = optax.adam(1e-2)


@eqx.filter_jit
def sample(model: Policy, prompts: jax.Array, key: jax.Array):
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    low = eqx.combine(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights), rest)
    tokens, logp_rollout, mask = rollout(low, prompts, key)
    return tokens, logp_rollout, score(model, prompts, tokens), mask


@eqx.filter_jit
def update(model: Policy, opt_state: optax.OptState, batch: dict[str, jax.Array]):
    """Updates on one mini-batch. Returns the model, the optimizer state and the loss."""

    @eqx.filter_value_and_grad
    def loss_of(model: Policy):
        logp = score(model, batch["prompts"], batch["tokens"])
        out = minirl(
            logp, batch["logp_old"], batch["logp_rollout"], batch["advantages"], batch["mask"]
        )
        total, count = aggregate(out.loss, batch["mask"])
        return total / count

    loss, gradient = loss_of(model)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return eqx.apply_updates(model, updates), opt_state, loss


def train(steps=20, seed=0):
    """Yields the loss of the last mini-batch and the mean reward of each step."""
    key, first = jax.random.split(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    model = Policy(first)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for draw in jax.random.split(key, steps):
        batch, mean = collect(partial(sample, model), rng, draw)
        for part in mini_batches(batch, rng):
            model, opt_state, loss = update(model, opt_state, part)
        yield float(loss), mean


def main():
    report(train())


if __name__ == "__main__":
    main()
