"""An independent Qwen3-MoE in NumPy and float64, one sequence, token and head at a time.

Written from the architecture (transformers `modeling_qwen3_moe.py`), not from the code under test;
only `unstack` knows how that code stores its weights.
"""

import math

import numpy as np


def unstack(model):
    """Returns the weights of `jaxrl_stable.model.Transformer` in float64, one dict per layer."""

    def array(param):
        return np.asarray(param.get_value(), np.float64)

    layers = []
    for blocks in model.stacks:
        for repeat in range(array(blocks[0].attention.query).shape[0]):
            for block in blocks:
                layer = {
                    "attention_norm": array(block.attention_norm.weight)[repeat],
                    "mlp_norm": array(block.mlp_norm.weight)[repeat],
                    "query_norm": array(block.attention.query_norm.weight)[repeat],
                    "key_norm": array(block.attention.key_norm.weight)[repeat],
                }
                for name in ("query", "key", "value", "out"):
                    layer[name] = array(getattr(block.attention, name))[repeat]
                for name in ("router", "gate", "up", "down"):
                    if hasattr(block.mlp, name):
                        layer[name] = array(getattr(block.mlp, name))[repeat]
                layers.append(layer)
    embedding = array(model.embedding)
    head = array(model.head) if hasattr(model, "head") else embedding.T
    return {
        "embedding": embedding,
        "layers": layers,
        "norm": array(model.norm.weight),
        "head": head,
    }


def forward(config, weights, tokens, replay=None):
    """Computes the hidden states of one sequence that starts at position 0.

    Args:
      config: the architecture.
      weights: result of `unstack`.
      tokens: ids, `[T]`.
      replay: experts to use, `[L, T, K]`; a negative first entry leaves the choice to the router.

    Returns:
      Hidden states after the last norm, `[T, D]`, and the experts used, `[L, T, K]`.
    """
    x = [weights["embedding"][token] for token in tokens]
    used = []
    for index, layer in enumerate(weights["layers"]):
        normed = [rms_norm(v, layer["attention_norm"], config.rms_norm_eps) for v in x]
        x = [a + b for a, b in zip(x, attention(config, layer, normed), strict=True)]
        normed = [rms_norm(v, layer["mlp_norm"], config.rms_norm_eps) for v in x]
        sparse = config.num_experts > 0 and index not in config.mlp_only_layers
        if sparse and (index + 1) % config.decoder_sparse_step == 0:
            forced = [None] * len(x) if replay is None else replay[len(used)]
            mixed = [mixture(config, layer, v, f) for v, f in zip(normed, forced, strict=True)]
            used.append([chosen for _, chosen in mixed])
            x = [a + y for a, (y, _) in zip(x, mixed, strict=True)]
        else:
            x = [
                a + swiglu(v, layer["gate"], layer["up"], layer["down"])
                for a, v in zip(x, normed, strict=True)
            ]
    hidden = np.stack([rms_norm(v, weights["norm"], config.rms_norm_eps) for v in x])
    return hidden, np.array(used)


def scores(weights, hidden, targets, temperature=1.0):
    """Returns log-probability of each target and entropy of each distribution, in nats."""
    logp, entropy = [], []
    for h, target in zip(hidden, targets, strict=True):
        p = softmax(h @ weights["head"] / temperature)
        logp.append(math.log(p[target]))
        entropy.append(-sum(q * math.log(q) for q in p))
    return np.array(logp), np.array(entropy)


def rms_norm(x, weight, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * weight


def softmax(x):
    y = np.exp(x - np.max(x))
    return y / y.sum()


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1.0 + np.exp(-g)) * (x @ up)) @ down


def rotate(x, position, theta):
    """Rotates the pairs (i, i + half) by `position * theta^(-2i / size)`."""
    half = len(x) // 2
    y = np.zeros_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def attention(config, layer, x):
    per_group = config.num_heads // config.num_kv_heads
    keys, values, outputs = [], [], []
    for position, vector in enumerate(x):
        rows = [vector @ layer["key"][:, g] for g in range(config.num_kv_heads)]
        rows = [rms_norm(row, layer["key_norm"], config.rms_norm_eps) for row in rows]
        keys.append([rotate(row, position, config.rope_theta) for row in rows])
        values.append([vector @ layer["value"][:, g] for g in range(config.num_kv_heads)])
        output = np.zeros_like(vector)
        for h in range(config.num_heads):
            query = rms_norm(
                vector @ layer["query"][:, h], layer["query_norm"], config.rms_norm_eps
            )
            query = rotate(query, position, config.rope_theta)
            g = h // per_group
            weights = softmax(
                np.array([query @ key[g] / math.sqrt(config.head_dim) for key in keys])
            )
            head = sum(w * value[g] for w, value in zip(weights, values, strict=True))
            output = output + head @ layer["out"][h]
        outputs.append(output)
    return outputs


def mixture(config, layer, x, forced):
    """Returns the output of the experts of one token, and the experts."""
    p = softmax(x @ layer["router"])
    chosen = sorted(range(config.num_experts), key=lambda e: -p[e])[: config.num_experts_per_token]
    if forced is not None and forced[0] >= 0:
        chosen = [int(e) for e in forced]
    gates = [p[e] for e in chosen]
    if config.norm_topk_prob:
        gates = [g / sum(gates) for g in gates]
    y = np.zeros_like(x)
    for gate, e in zip(gates, chosen, strict=True):
        y = y + gate * swiglu(x, layer["gate"][e], layer["up"][e], layer["down"][e])
    return y, chosen
