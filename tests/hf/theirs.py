"""Results of transformers on a batch, with the names used in `ours`; needs torch."""

import contextlib

import numpy as np
import torch

from tests.hf import batches


def observe(model, tokens, positions, segments):
    """Returns intermediate results of a batch with one sequence per row (see `ours.observe`)."""
    with _recorded(model) as (layers, gates), torch.no_grad():
        output = model(**_inputs(tokens, positions, segments), output_hidden_states=True)
    following = torch.tensor(np.roll(tokens, -1, axis=1))[..., None]
    logp = torch.log_softmax(output.logits.float(), -1).gather(-1, following)[..., 0].numpy()
    shape = (0, *tokens.shape, _experts(model.config))
    gates = np.stack([g.reshape(*tokens.shape, -1) for g in gates]) if gates else np.zeros(shape)
    return dict(
        layers=np.stack(layers),
        hidden=output.hidden_states[-1].float().numpy(),
        logits=output.logits.float().numpy(),
        logp=np.where(batches.successors(segments), logp, 0),
        experts=(gates > 0).astype(np.float32),
        gates=gates,
    )


def observe_alone(model, tokens, segments):
    """Returns hidden states and log-probabilities of packed rows, one pass per sequence."""
    hidden = np.zeros((*tokens.shape, model.config.hidden_size), np.float32)
    logp = np.zeros(tokens.shape, np.float32)
    for row, columns in batches.spans(segments):
        alone = tokens[None, row, columns]
        ones = np.ones_like(alone)
        seen = observe(model, alone, np.cumsum(ones, axis=1) - 1, ones)
        hidden[row, columns], logp[row, columns] = seen["hidden"][0], seen["logp"][0]
    return dict(hidden=hidden, logp=logp)


def gradients(model, tokens, positions, segments):
    """Returns gradients of Σ w · log π(next token) by parameter."""
    model.zero_grad()
    logits = model(**_inputs(tokens, positions, segments)).logits
    following = torch.tensor(np.roll(tokens, -1, axis=1))[..., None]
    logp = torch.log_softmax(logits, -1).gather(-1, following)[..., 0]
    (torch.tensor(batches.loss_weights(segments)) * logp).sum().backward()
    zero = torch.zeros(1)  # experts that no token chose have none
    return {
        name: (zero.expand_as(weight) if weight.grad is None else weight.grad).numpy()
        for name, weight in model.named_parameters()
    }


def greedy(model, tokens, segments):
    """Returns the greedy continuation and the smallest lead of a token over the second."""
    inputs = _inputs(tokens, None, segments)
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=batches.RESPONSE,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(output.logits).topk(2, dim=-1)[0]
    return output.sequences[:, tokens.shape[1] :].numpy(), float(
        (best[..., 0] - best[..., 1]).min()
    )


def continued(model, tokens, segments, response):
    """Returns log-probabilities of a continuation, from one pass over prompt and response."""
    tokens = np.concatenate([tokens, response], axis=1)
    segments = np.concatenate([segments, np.ones_like(response)], axis=1)
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    seen = observe(model, tokens, positions, segments)["logp"]
    return seen[:, -response.shape[1] - 1 : -1]


def _inputs(tokens, positions, segments):
    inputs = dict(input_ids=tokens, attention_mask=segments)
    if positions is not None:
        inputs["position_ids"] = positions
    return {name: torch.tensor(value) for name, value in inputs.items()}


@contextlib.contextmanager
def _recorded(model):
    """Records the outputs of all blocks, and the gates of all routers over all experts."""
    layers, gates, hooks = [], [], []

    def of_block(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        layers.append(output.float().numpy())

    def of_router(module, inputs, output):
        gates.append(_gates(model.config, output))

    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(of_block))
        mixture = getattr(layer, "mlp", None) or layer.block_sparse_moe
        if hasattr(mixture, "experts"):
            hooks.append(mixture.gate.register_forward_hook(of_router))
    try:
        yield layers, gates
    finally:
        for hook in hooks:
            hook.remove()


def _gates(config, output):
    """Converts a router's output to one gate per expert, 0 for those not chosen."""
    if isinstance(output, torch.Tensor):  # version 4 returns logits; the block does the rest
        scores = torch.softmax(output.float(), -1)
        weights, chosen = scores.topk(config.num_experts_per_tok, -1)
        if getattr(config, "norm_topk_prob", True):  # Mixtral always does
            weights = weights / weights.sum(-1, keepdim=True)
    elif output[0].dtype == torch.int64:  # DeepSeek in version 4
        chosen, weights = output
    else:
        _, weights, chosen = output
    dense = torch.zeros(len(chosen), _experts(config))
    return dense.scatter(1, chosen, weights.float()).numpy()


def _experts(config):
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hasattr(config, name):
            return getattr(config, name)
    return 0
