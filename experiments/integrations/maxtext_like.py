"""Routing Replay in another trainer: an expert layer with MaxText's replay argument.

    python experiments/integrations/maxtext_like.py

The sampler is this library's. It runs an int8 copy of the weights and records the experts e^μ of
every token. The trainer is a decoder in the style of MaxText: `forced_routed_experts`, int32
[B, T, L, K] with −1 where nothing was recorded, replaces `top_k`. Gates are gathered from the live
logits, so that the router keeps its gradient. `to_token_major` is the only glue between the two.

Attention and norms come from `jaxrl_stable.model`; both decoders share their weights. The reward is
the share of even tokens in the response.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from plain_jax import report

from jaxrl_stable.advantages import centered
from jaxrl_stable.model import init_model, tiny, token_log_probs
from jaxrl_stable.model.attention import make_frame
from jaxrl_stable.objectives import aggregate, minirl
from jaxrl_stable.routing import to_token_major
from jaxrl_stable.sampler.quantize import quantize
from jaxrl_stable.sampler.rollout import Sampling, rollout

CONFIG = tiny(vocab_size=16, hidden_size=32, num_layers=2, head_dim=8, moe_intermediate_size=16)
SAMPLING = Sampling(max_tokens=6, stop_ids=(0,))
PROMPTS, GROUP, WIDTH = 4, 8, 3
UPDATES = 2  # per rollout


def mixture(weights, x, forced):
    """Applies one layer of experts. Returns its output and the experts used, [B, T, K]."""
    logits = x.astype(jnp.float32) @ weights.router[...]
    _, chosen = jax.lax.top_k(logits, CONFIG.num_experts_per_token)
    if forced is not None:
        chosen = jnp.where(forced >= 0, forced, chosen)  # −1: this router decides
    gates = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1))
    gate, up, down = weights.gate[...], weights.up[...], weights.down[...]
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    every = jnp.einsum("btef,efd->bted", hidden, down)
    picked = jnp.take_along_axis(every, chosen[..., None], axis=2)
    return jnp.einsum("btkd,btk->btd", picked, gates), chosen


def decoder(model, tokens, real, forced_routed_experts=None):
    """Returns the final hidden states and the experts used, [B, T, L, K]."""
    positions = jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
    frame = make_frame(CONFIG, positions, real.astype(jnp.int32), cache=None)
    forced = forced_routed_experts
    if forced is not None:
        forced = jnp.moveaxis(forced, 2, 0)  # scanned along with the layers

    def layer(x, inputs):
        block, forced = inputs
        x = x + block.attention(block.attention_norm(x), frame, None, 0)[0]
        y, chosen = mixture(block.mlp, block.mlp_norm(x), forced)
        return x + y, chosen

    x = model.embedding[...][tokens]
    x, chosen = jax.lax.scan(layer, x, (model.stacks[0][0], forced))
    return model.norm(x), jnp.moveaxis(chosen, 0, 2)


def log_probs(model, batch, forced_routed_experts):
    """Returns log π of `tokens[b, t]` at `[b, t]`, predicted by the previous hidden state."""
    hidden, _ = decoder(model, batch.tokens, batch.real, forced_routed_experts)
    logp = token_log_probs(model, hidden[:, :-1], batch.tokens[:, 1:]).logp
    return jnp.where(batch.response_mask, jnp.pad(logp, ((0, 0), (1, 0))), 0.0)


def loss_of(model, batch, logp_old, advantages):
    forced = to_token_major(batch.routing)
    logp = log_probs(model, batch, forced)
    out = minirl(logp, logp_old, batch.logp_rollout, advantages, batch.response_mask)
    total, count = aggregate(out.loss, batch.response_mask)
    return total / count


optimizer = optax.adam(1e-2)


@jax.jit
def sample(model, prompts, key):
    """Returns the rollout, and log π_old of the training program with its experts (R3)."""
    mask = jnp.ones(prompts.shape, bool)
    batch = rollout(quantize(model, "int8"), prompts, mask, key, sampling=SAMPLING)
    return batch, log_probs(model, batch, to_token_major(batch.routing))


@jax.jit
def update(model, opt_state, batch, logp_old, advantages):
    loss, gradient = jax.value_and_grad(loss_of)(model, batch, logp_old, advantages)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(model, updates), opt_state, loss


def train(steps=10, seed=0):
    """Yields the loss of the last update and the mean reward of each step."""
    model = jax.jit(partial(init_model, CONFIG, seed))()
    opt_state = optimizer.init(model)
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(PROMPTS), GROUP)
    for key in jax.random.split(jax.random.key(seed), steps):
        prompts = np.repeat(rng.integers(1, CONFIG.vocab_size, (PROMPTS, WIDTH)), GROUP, axis=0)
        batch, logp_old = sample(model, prompts, key)
        tokens, mask = np.asarray(batch.tokens), np.asarray(batch.response_mask)
        rewards = ((tokens % 2 == 0) & mask).sum(1) / mask.sum(1)
        advantages = centered(rewards, groups)
        for _ in range(UPDATES):
            model, opt_state, loss = update(model, opt_state, batch, logp_old, advantages)
        yield float(loss), float(rewards.mean())


def main():
    report(train())


if __name__ == "__main__":
    main()
