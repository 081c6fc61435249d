"""One layer of experts in NumPy float64: every kind of router, replay, and gradients by hand.

Written from the published arithmetic of routing replay (Ma et al., arXiv:2510.11370, §3, and the
table of score functions in Megatron-LM's `topk_routing_with_score_function`), token by token and
slot by slot. It shares no code with the package.

For a token x with router logits s = x W:

    scores p      softmax over all E experts, or σ of each
    live choice   the K largest p + bias, within the best groups when there are groups
    replay        replaces the choice and nothing else: bias and groups are skipped
    gates g       softmax router, normalised    softmax over the K gathered logits
                  softmax router, raw           p gathered
                  sigmoid router, normalised    p gathered / (their sum + 1e-20)
                  sigmoid router, raw           p gathered
                  each times a constant factor; the bias is never part of them
    output        Σ_k g_k expert_{i_k}(x) + shared(x)
"""

from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """How a router scores, chooses and weights experts."""

    score: str  # "softmax" or "sigmoid"
    normalised: bool
    k: int
    groups: int = 1
    chosen_groups: int = 1
    scaling: float = 1.0


def scores(kind, s):
    """Returns p: one score per expert."""
    if kind.score == "sigmoid":
        return 1.0 / (1.0 + np.exp(-s))
    p = np.exp(s - s.max())
    return p / p.sum()


def live_choice(kind, s, bias):
    """Returns the router's own K experts, best first."""
    ranked = scores(kind, s) + bias
    allowed = range(len(s))
    if kind.groups > 1:
        size = len(s) // kind.groups
        members = [range(g * size, (g + 1) * size) for g in range(kind.groups)]
        strength = [sum(sorted(ranked[e] for e in group)[-2:]) for group in members]
        best = sorted(range(kind.groups), key=lambda g: -strength[g])[: kind.chosen_groups]
        allowed = [e for g in best for e in members[g]]
    return sorted(allowed, key=lambda e: -ranked[e])[: kind.k]


def gate_weights(kind, s, chosen):
    """Returns g: one gate per slot, from the live scores, whoever made the choice."""
    if kind.score == "softmax" and kind.normalised:
        gates = scores(kind, s[chosen])
    else:
        gates = scores(kind, s)[chosen]
        if kind.normalised:
            gates = gates / (gates.sum() + 1e-20)
    return kind.scaling * gates


def swiglu(x, gate, up, down):
    a = x @ gate
    return (a * _sigmoid(a) * (x @ up)) @ down


def route(kind, weights, x, forced):
    """Returns logits, experts and gates of one token; `forced` is a choice to replay, or None."""
    s = x @ weights["router"]
    chosen = live_choice(kind, s, weights["bias"]) if forced is None else list(forced)
    return s, chosen, gate_weights(kind, s, chosen)


def forward(kind, weights, x, replay):
    """Returns outputs `[N, D]`, and the experts, gates and share of all scores of each token.

    Args:
      kind: the router.
      weights: router `[D, E]`, bias `[E]`, gate and up `[E, D, F]`, down `[E, F, D]`, and
        shared_gate, shared_up `[D, S]`, shared_down `[S, D]` (S may be 0).
      x: tokens, `[N, D]`.
      replay: for each token its K experts, or None for the live choice.
    """
    y, routed = np.zeros_like(x), []
    for n, forced in enumerate(replay):
        s, chosen, gates = route(kind, weights, x[n], forced)
        y[n] = swiglu(x[n], *(weights["shared_" + name] for name in ("gate", "up", "down")))
        for e, g in zip(chosen, gates, strict=True):
            y[n] += g * swiglu(x[n], *(weights[name][e] for name in ("gate", "up", "down")))
        p = scores(kind, s)
        routed.append((chosen, gates, p[chosen].sum() / p.sum()))
    return y, routed


def gradients(kind, weights, x, replay, upstream):
    """Returns gradients of Σ upstream · output by every weight and by x, derived by hand."""
    grads = {name: np.zeros_like(value) for name, value in weights.items()} | {
        "x": np.zeros_like(x)
    }
    for n, forced in enumerate(replay):
        s, chosen, gates = route(kind, weights, x[n], forced)
        value = np.zeros(len(chosen))  # ∂ loss / ∂ g_k
        for slot, (e, g) in enumerate(zip(chosen, gates, strict=True)):
            matrices = [weights[name][e] for name in ("gate", "up", "down")]
            value[slot] = upstream[n] @ swiglu(x[n], *matrices)
            *parts, dx = swiglu_gradients(x[n], *matrices, g * upstream[n])
            for name, part in zip(("gate", "up", "down"), parts, strict=True):
                grads[name][e] += part
            grads["x"][n] += dx
        ds = logit_gradients(kind, s, chosen, value)
        grads["router"] += np.outer(x[n], ds)
        grads["x"][n] += weights["router"] @ ds
        shared = [weights["shared_" + name] for name in ("gate", "up", "down")]
        *parts, dx = swiglu_gradients(x[n], *shared, upstream[n])
        for name, part in zip(("gate", "up", "down"), parts, strict=True):
            grads["shared_" + name] += part
        grads["x"][n] += dx
    return grads


def logit_gradients(kind, s, chosen, value):
    """Returns ∂ loss / ∂ s of E logits from ∂ loss / ∂ g of K slots; the choice is a constant."""
    p, ds = scores(kind, s), np.zeros_like(s)
    total = p[chosen].sum()
    for k, e in enumerate(chosen):
        upstream = kind.scaling * value[k]
        if kind.score == "sigmoid" and not kind.normalised:
            ds[e] += upstream * p[e] * (1 - p[e])
        elif kind.score == "sigmoid":  # g_k = p_k / (Σ_j p_j + 1e-20)
            for j in chosen:
                quotient = (j == e) / (total + 1e-20) - p[e] / (total + 1e-20) ** 2
                ds[j] += upstream * quotient * p[j] * (1 - p[j])
        elif not kind.normalised:  # ∂ p_e / ∂ s_j = p_e (1[e = j] − p_j) for all E experts j
            for j in range(len(s)):
                ds[j] += upstream * p[e] * ((j == e) - p[j])
        else:  # the same within the K chosen ones
            for j in chosen:
                ds[j] += upstream * p[e] / total * ((j == e) - p[j] / total)
    return ds


def swiglu_gradients(x, gate, up, down, upstream):
    """Returns gradients of upstream · swiglu by gate, up, down and x."""
    a, b = x @ gate, x @ up
    silu = a * _sigmoid(a)
    slope = _sigmoid(a) * (1 + a * (1 - _sigmoid(a)))
    hidden = down @ upstream
    da, db = hidden * b * slope, hidden * silu
    return np.outer(x, da), np.outer(x, db), np.outer(silu * b, upstream), gate @ da + up @ db


def _sigmoid(a):
    return 1.0 / (1.0 + np.exp(-a))
