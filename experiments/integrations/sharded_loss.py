"""One mini-batch over devices and micro-batches: sums add up and are divided once.

    python experiments/integrations/sharded_loss.py

Responses differ in length and rows may be empty, so a mean of means is a different loss. Therefore
`aggregate` returns (total, count): gradients of totals add up over micro-batches in a scan and over
devices in one `psum`, and `divide` comes last. The toy is the one of `plain_jax.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from plain_jax import collect, init, mini_batches, optimizer, policy, report, sample, score

from jaxrl_stable.objectives import aggregate, divide, minirl

MICRO_BATCHES = 2  # per device


def total_of(params, batch, mode="seq-mean-token-sum"):
    logp = score(partial(policy, params), batch["prompts"], batch["tokens"])
    out = minirl(logp, batch["logp_old"], batch["logp_rollout"], batch["advantages"], batch["mask"])
    return aggregate(out.loss, batch["mask"], mode)


def loss_and_gradient(mesh, mode="seq-mean-token-sum", micro_batches=MICRO_BATCHES):
    """Returns `(params, batch) -> (loss, gradient)`, with rows spread over the axis "data"."""

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def run(params, batch):
        # Marked as different on each device. Otherwise JAX sums the gradient of shared weights
        # over the devices in every micro-batch.
        params, zero = jax.lax.pcast((params, jnp.zeros(())), "data", to="varying")
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)

        def add(sums, part):
            value = jax.value_and_grad(partial(total_of, mode=mode), has_aux=True)(params, part)
            return jax.tree.map(jnp.add, sums, value), None

        start = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
        sums, _ = jax.lax.scan(add, start, parts)
        (total, count), gradient = jax.lax.psum(sums, "data")
        return divide(total, count), jax.tree.map(lambda g: divide(g, count), gradient)

    return run


def train(steps=20, seed=0):
    """Yields the loss of the last mini-batch and the mean reward of each step."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = loss_and_gradient(mesh)
    key, first = jax.random.split(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = init(first)
    opt_state = optimizer.init(params)
    for _ in range(steps):
        key, draw = jax.random.split(key)
        batch, mean = collect(partial(sample, params), rng, draw)
        for part in mini_batches(batch, rng):
            loss, gradient = run(params, part)
            updates, opt_state = optimizer.update(gradient, opt_state)
            params = optax.apply_updates(params, updates)
        yield float(loss), mean


def main():
    jax.config.update("jax_num_cpu_devices", 4)  # without an accelerator: four virtual devices
    report(train())


if __name__ == "__main__":
    main()
