"""Results of this package on a batch, as NumPy arrays with the names used in comparisons."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable import hf
from jaxrl_stable.configs import MeshShape
from jaxrl_stable.hf.names import parameters, pieces, tensor_shapes
from jaxrl_stable.model import experts, head, init_model, router, token_log_probs, transformer
from jaxrl_stable.routing import Routing, expert_dtype
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.sharding import make_mesh
from tests.hf import batches


def load(directory, config=None, **execution):
    """Loads a checkpoint on one device."""
    if config is None:
        config = hf.read_config(directory, **execution)
    return hf.load(directory, make_mesh(MeshShape(), jax.devices()[:1]), config)


def with_config(model, config):
    """Returns the same weights under a config that differs only in fields without parameters."""
    structure = jax.tree.structure(jax.eval_shape(lambda: init_model(config, 0)))
    return jax.tree.unflatten(structure, jax.tree.leaves(model))


def observe(model, tokens, positions, segments, replay=None):
    """Runs a pass without gradient and with unrolled layers, and returns its intermediate results.

    Returns:
      layers: output of every block, `[layers, B, T, D]`.
      hidden, logits: hidden states and logits of every token.
      logp: log π(next token); 0 at the end of a sequence.
      experts: booleans of the chosen experts in MoE layers, `[L, B, T, E]`.
      gates: their weights, 0 for other experts, `[L, B, T, E]`.
    """
    model = with_config(model, dataclasses.replace(model.config, scan_layers=False))
    seen = jax.device_get(_observe(model, tokens, positions, segments, replay))
    seen["logp"] = np.where(batches.successors(segments), seen["logp"], 0)
    return {name: np.asarray(value, np.float32) for name, value in seen.items()}


@jax.jit
def _observe(model, tokens, positions, segments, replay):
    config, layers, gates = model.config, [], []
    block = transformer.Block.__call__

    def recorded_block(*arguments):
        x, *rest = block(*arguments)
        layers.append(x)
        return x, *rest

    def recorded_gates(logits, chosen, config):
        weights, share = router.gate_weights(logits, chosen, config)
        gates.append((jax.nn.one_hot(chosen, config.num_experts) * weights[..., None]).sum(-2))
        return weights, share

    with (
        mock.patch.object(transformer.Block, "__call__", recorded_block),
        mock.patch.object(experts, "gate_weights", recorded_gates),
    ):
        output = model(tokens, positions, segments, replay=replay)
    chosen = jax.nn.one_hot(output.router.experts, config.num_experts).any(-2)
    return dict(
        layers=jnp.stack(layers),
        hidden=output.hidden,
        logits=head.logits(model, output.hidden, 1.0),
        logp=token_log_probs(model, output.hidden, jnp.roll(tokens, -1, axis=1)).logp,
        experts=chosen,
        gates=jnp.stack(gates) if gates else jnp.zeros(chosen.shape),
    )


def routing(experts, segments):
    """Returns a routing to replay, from booleans `[L, B, T, E]`; slots have any order."""
    chosen = int(experts[:, segments != 0].sum(-1).max())
    order = np.argsort(-experts, axis=-1, kind="stable")[..., :chosen]
    return Routing(jnp.asarray(order, expert_dtype(experts.shape[-1])), jnp.asarray(segments != 0))


def gradients(model, tokens, positions, segments, layout="fused"):
    """Returns gradients of Σ w · log π(next token) by tensor, with scanned layers."""
    weights = batches.loss_weights(segments)
    return tensors(_gradients(model, tokens, positions, segments, weights), layout)


@jax.jit
@jax.grad
def _gradients(model, tokens, positions, segments, weights):
    hidden = model(tokens, positions, segments).hidden
    return jnp.sum(weights * token_log_probs(model, hidden, jnp.roll(tokens, -1, axis=1)).logp)


def tensors(model, layout):
    """Returns a tree of parameters (or their gradients) as tensors of a checkpoint."""
    architecture, _ = hf.config.to_json(model.config)
    plan = pieces(model.config, model, architecture.model_type, layout)
    found = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(plan).items()}
    for path, param in parameters(model).items():
        value = np.asarray(param.get_value(), np.float32)
        for piece in plan[path]:
            part = value[piece.index]
            if piece.transposed:
                part = part.reshape(piece.columns, piece.rows).T
            target = found[piece.tensor][piece.lead]
            rows = slice(piece.start, piece.start + piece.rows)
            target[rows] = part.reshape(target[rows].shape)
    return found


def greedy(model, tokens, segments):
    """Returns the greedy continuation through the cache: tokens and log-probabilities."""
    trajectory = _greedy(model, tokens, segments != 0, jax.random.key(0))
    columns = slice(batches.WIDTH, None)
    return np.asarray(trajectory.tokens)[:, columns], np.asarray(trajectory.logp_rollout)[
        :, columns
    ]


_greedy = jax.jit(functools.partial(rollout, sampling=Sampling(batches.RESPONSE, temperature=0.0)))
