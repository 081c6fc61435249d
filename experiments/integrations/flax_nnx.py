"""The loss inside a stateful Flax NNX module, on the toy of `plain_jax.py`.

    python experiments/integrations/flax_nnx.py

`nnx.value_and_grad` differentiates through the module and `nnx.Optimizer` changes it in place. The
loss sees only the arrays that `score` returns.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from plain_jax import VOCAB, WIDTH, collect, mini_batches, report, rollout, score

from jaxrl_stable.objectives import aggregate, minirl


class Policy(nnx.Module):
    """Logits of the next token, from the token before it."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, previous: jax.Array) -> jax.Array:
        return self.out(nnx.tanh(self.hidden(self.embed(previous))))


@nnx.jit
def sample(model: Policy, prompts: jax.Array, key: jax.Array):
    graph, weights = nnx.split(model)
    low = nnx.merge(graph, jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
    tokens, logp_rollout, mask = rollout(low, prompts, key)
    return tokens, logp_rollout, score(model, prompts, tokens), mask


@nnx.jit
def update(model: Policy, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]) -> jax.Array:
    """Updates model and optimizer in place on one mini-batch. Returns the loss."""

    def loss_of(model: Policy):
        logp = score(model, batch["prompts"], batch["tokens"])
        out = minirl(
            logp, batch["logp_old"], batch["logp_rollout"], batch["advantages"], batch["mask"]
        )
        total, count = aggregate(out.loss, batch["mask"])
        return total / count

    loss, gradient = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradient)
    return loss


def train(steps=20, seed=0):
    """Yields the loss of the last mini-batch and the mean reward of each step."""
    model = Policy(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    for key in jax.random.split(jax.random.key(seed), steps):
        batch, mean = collect(partial(sample, model), rng, key)
        for part in mini_batches(batch, rng):
            loss = update(model, optimizer, part)
        yield float(loss), mean


def main():
    report(train())


if __name__ == "__main__":
    main()
