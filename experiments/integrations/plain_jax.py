"""MiniRL in plain JAX: the policy is a dict of arrays, the update is `jax.grad` and optax.

    python experiments/integrations/plain_jax.py

The toy, shared with the other examples: the prompt is a number, and the response counts up from it
to 0, which serves as EOS (5: 6 7 0). The reward is the share of the right answer that comes before
the first mistake.

Three policies take part, as in any large run. The sampler μ_old is a bfloat16 copy of the weights.
π_old is the training program at the same weights. π_θ is updated several times per rollout.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_stable.advantages import centered
from jaxrl_stable.objectives import aggregate, minirl

VOCAB, WIDTH = 8, 32  # numbers 0 to 7; 0 ends a response
LENGTH = 8  # longest response
PROMPTS, GROUP = 12, 8  # prompts per batch, responses per prompt
MINI_BATCHES = 4  # updates per rollout


def init(key):
    embed, hidden, out = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(embed, (VOCAB, WIDTH)),
        "hidden": jax.random.normal(hidden, (WIDTH, WIDTH)) / WIDTH**0.5,
        "out": jax.random.normal(out, (WIDTH, VOCAB)) / WIDTH**0.5,
    }


def policy(params, previous):
    """Returns the logits of the next token; the task needs only the previous token."""
    x = params["embed"][previous]
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def rollout(logits_of, prompts, key):
    """Samples a response per prompt. Returns tokens, log μ as sampled and the mask, [B, T]."""

    def step(carry, key):
        previous, running = carry
        log_probs = jax.nn.log_softmax(logits_of(previous).astype(jnp.float32))
        token = jax.random.categorical(key, log_probs)
        logp = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
        return (token, running & (token != 0)), (token, logp, running)

    running = jnp.ones(prompts.shape, bool)
    _, columns = jax.lax.scan(step, (prompts, running), jax.random.split(key, LENGTH))
    tokens, logp, mask = (jnp.swapaxes(x, 0, 1) for x in columns)
    return tokens, logp, mask  # True on the 0 that ends a response, False after it


def score(logits_of, prompts, tokens):
    """Returns log π of `tokens[b, t]`, given the tokens before it, at `[b, t]`."""
    previous = jnp.concatenate([prompts[:, None], tokens[:, :-1]], axis=1)
    log_probs = jax.nn.log_softmax(logits_of(previous).astype(jnp.float32))
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def reward(prompts, tokens, mask):
    """Returns the share of the right answer that comes before the first mistake."""
    right = (prompts[:, None] + 1 + np.arange(LENGTH)) % VOCAB
    said = np.cumprod((tokens == right) & mask, axis=1).sum(1)
    return (said / (VOCAB - prompts)).astype(np.float32)


def collect(sample, rng, key):
    """Returns a batch and the mean reward; `sample(prompts, key)` runs on the device."""
    prompts = np.repeat(rng.integers(1, VOCAB, PROMPTS), GROUP)
    tokens, logp_rollout, logp_old, mask = sample(prompts, key)
    rewards = reward(prompts, np.asarray(tokens), np.asarray(mask))
    batch = {
        "prompts": prompts,
        "tokens": tokens,
        "mask": mask,
        "logp_rollout": logp_rollout,
        "logp_old": logp_old,
        "advantages": centered(rewards, np.repeat(np.arange(PROMPTS), GROUP)),
    }
    return batch, float(rewards.mean())


def mini_batches(batch, rng):
    for rows in np.split(rng.permutation(PROMPTS * GROUP), MINI_BATCHES):
        yield {name: array[rows] for name, array in batch.items()}


optimizer = optax.adam(1e-2)


@jax.jit
def sample(params, prompts, key):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    tokens, logp_rollout, mask = rollout(lambda x: policy(low, x), prompts, key)
    return tokens, logp_rollout, score(lambda x: policy(params, x), prompts, tokens), mask


@jax.jit
def update(params, opt_state, batch):
    """Updates on one mini-batch. Returns weights, optimizer state and loss."""

    def loss_of(params):
        logp = score(lambda x: policy(params, x), batch["prompts"], batch["tokens"])
        out = minirl(
            logp, batch["logp_old"], batch["logp_rollout"], batch["advantages"], batch["mask"]
        )
        total, count = aggregate(out.loss, batch["mask"])
        return total / count

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def train(steps=20, seed=0):
    """Yields the loss of the last mini-batch and the mean reward of each step."""
    key, first = jax.random.split(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = init(first)
    opt_state = optimizer.init(params)
    for _ in range(steps):
        key, draw = jax.random.split(key)
        batch, mean = collect(partial(sample, params), rng, draw)
        for part in mini_batches(batch, rng):
            params, opt_state, loss = update(params, opt_state, part)
        yield float(loss), mean


def report(steps):
    for step, (loss, mean) in enumerate(steps):
        print(f"step {step:2d}   loss {loss:7.3f}   reward {mean:.3f}")


def main():
    report(train())


if __name__ == "__main__":
    main()
