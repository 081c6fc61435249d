"""Hand-derived gradients of every objective, in NumPy and float64: the reference of the tests.

Each function returns dL/dlogp of the aggregated loss, token by token and in plain probabilities,
straight from the formulas of the papers. Nothing here comes from the package that is tested.
`factor[i, t]` is the aggregation's factor of the loss at token t. A loss that belongs to a
whole response is repeated at each of its tokens, so its factor is the sum of the row.
"""

from typing import NamedTuple

import numpy as np

HORIZON = 20
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def aggregation_factor(mask, mode, horizon=HORIZON):
    """d total / d loss[i, t]; rows without a response are not sequences."""
    tokens_of_row = mask.sum(1)
    sequences = sum(n > 0 for n in tokens_of_row)
    factor = np.zeros(mask.shape)
    for i, t in np.argwhere(mask):
        factor[i, t] = {
            "token-mean": 1 / mask.sum(),
            "token-sum": 1.0,
            "seq-mean-token-sum": 1 / sequences,
            "seq-mean-token-mean": 1 / sequences / tokens_of_row[i],
            "seq-mean-token-sum-norm": 1 / sequences / horizon,
        }[mode]
    return factor


class Derived(NamedTuple):
    gradient: np.ndarray
    silent: np.ndarray  # the gradient is silenced here
    capped: np.ndarray  # the weight met a cap here, and the gradient goes on


def blank(mask):
    return Derived(np.zeros(mask.shape), np.zeros(mask.shape, bool), np.zeros(mask.shape, bool))


def tokens(advantages, mask):
    """Yields (row, position, advantage) of every response token."""
    for i, t in np.argwhere(mask):
        yield i, t, advantages[i] if advantages.ndim == 1 else advantages[i, t]


def rows(mask):
    """Yields (row, its positions) of every response."""
    for i in range(len(mask)):
        if mask[i].any():
            yield i, np.flatnonzero(mask[i])


def outside(ratio, a, low, high):
    """Returns whether the clip acts: only where the step would go further out."""
    return (a > 0 and ratio > high) or (a < 0 and ratio < low)


def clamp(x, low, high):
    if low is not None and x < low:
        return low
    return high if high is not None and x > high else x


def minirl(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    clip=True,
    clip_low=0.2,
    clip_high=0.27,
    clip_anchor="old",
    weight="full",
    truncation=5.0,
):
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        p, p_old, p_rollout = np.exp(logp[i, t]), np.exp(old[i, t]), np.exp(rollout[i, t])
        w = {"full": p / p_rollout, "mismatch": p_old / p_rollout, "none": 1.0}[weight]
        anchor = {"old": p_old, "rollout": p_rollout}[clip_anchor]
        out.capped[i, t] = truncation is not None and w > truncation
        out.silent[i, t] = clip and outside(p / anchor, a, 1 - clip_low, 1 + clip_high)
        if not out.silent[i, t]:
            out.gradient[i, t] = -clamp(w, None, truncation) * a * factor[i, t]
    return out


def reinforce(logp, old, rollout, advantages, mask, factor):
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        out.gradient[i, t] = -a * factor[i, t]
    return out


def dro(logp, old, rollout, advantages, mask, factor, *, beta=0.05):
    """d/dl of -(A l - beta/2 (l - lo)^2)."""
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        out.gradient[i, t] = -(a - beta * (logp[i, t] - old[i, t])) * factor[i, t]
    return out


def ppo(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
):
    """dr/dl = r; the clipped branch and the dual clip's are constants."""
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        r = np.exp(logp[i, t]) / np.exp(old[i, t])
        out.silent[i, t] = outside(r, a, 1 - clip_low, 1 + clip_high) or (
            dual_clip is not None and a < 0 and r > dual_clip
        )
        if not out.silent[i, t]:
            out.gradient[i, t] = -r * a * factor[i, t]
    return out


def cispo(logp, old, rollout, advantages, mask, factor, *, clip_low=None, clip_high=4.0):
    low, high = None if clip_low is None else 1 - clip_low, 1 + clip_high
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        r = np.exp(logp[i, t]) / np.exp(old[i, t])
        w = clamp(r, low, high)
        out.capped[i, t] = w != r
        out.gradient[i, t] = -w * a * factor[i, t]
    return out


def minpro(logp, old, rollout, advantages, mask, factor, *, clip_low=None, clip_high=4.0):
    """CISPO's weight times the smallest ratio among the earlier response tokens."""
    low, high = None if clip_low is None else 1 - clip_low, 1 + clip_high
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        before = [np.exp(logp[i, s]) / np.exp(old[i, s]) for s in range(t) if mask[i, s]]
        product = min(before, default=1.0) * np.exp(logp[i, t]) / np.exp(old[i, t])
        w = clamp(product, low, high)
        out.capped[i, t] = w != product
        out.gradient[i, t] = -w * a * factor[i, t]
    return out


def sequence_ratio(logp, old, i, at):
    """The |y|-th root of the quotient of the two likelihoods of a response."""
    return (np.prod(np.exp(logp[i, at])) / np.prod(np.exp(old[i, at]))) ** (1 / len(at))


def gspo(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    form="sequence",
    clip_low=3e-4,
    clip_high=4e-4,
):
    """ds/dl_t = s/|y|; in the token form d s_t/dl_t = s, but of one token's loss alone."""
    out = blank(mask)
    ratio = {i: sequence_ratio(logp, old, i, at) for i, at in rows(mask)}
    for i, t, a in tokens(advantages, mask):
        share = factor[i, t] if form == "token" else factor[i, mask[i]].sum() / mask[i].sum()
        out.silent[i, t] = outside(ratio[i], a, 1 - clip_low, 1 + clip_high)
        if not out.silent[i, t]:
            out.gradient[i, t] = -a * ratio[i] * share
    return out


def luspo(logp, old, rollout, advantages, mask, factor, *, clip_low=2e-3, clip_high=2.5e-3):
    out = gspo(logp, old, rollout, advantages, mask, factor, clip_low=clip_low, clip_high=clip_high)
    return out._replace(gradient=out.gradient * mask.sum(1)[:, None])


def gmpo(logp, old, rollout, advantages, mask, factor, *, clip_low=0.4, clip_high=0.4):
    """A geometric mean: an unclipped token has the derivative (mean)/|y|, a clipped one has 0."""
    out = blank(mask)
    for i, at in rows(mask):
        a, product = advantages[i], 1.0
        for t in at:
            r = np.exp(logp[i, t]) / np.exp(old[i, t])
            out.silent[i, t] = outside(r, a, np.exp(-clip_low), np.exp(clip_high))
            product *= clamp(r, np.exp(-clip_low), np.exp(clip_high)) if out.silent[i, t] else r
        for t in at[~out.silent[i, at]]:
            mean = product ** (1 / len(at))
            out.gradient[i, t] = -a * mean / len(at) * factor[i, at].sum()
    return out


def sapo(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    temperature_high=1.0,
    temperature_low=1.05,
):
    """d/dl of (4/tau) sigma(tau (r - 1)) is 4 sigma (1 - sigma) r."""
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        r = np.exp(logp[i, t]) / np.exp(old[i, t])
        tau = temperature_high if a > 0 else temperature_low
        sigma = 1 / (1 + np.exp(-tau * (r - 1)))
        out.gradient[i, t] = -4 * sigma * (1 - sigma) * r * a * factor[i, t]
    return out


def vespo(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    positive=(2.0, 3.0),
    negative=(3.0, 2.0),
    tis_cap=None,
):
    """phi(W) = W^k exp(lambda (1 - W)) of the product of the ratios."""
    out = blank(mask)
    for i, at in rows(mask):
        a, product = advantages[i], 1.0
        for t in at:
            product *= np.exp(logp[i, t]) / np.exp(old[i, t])
            if tis_cap is not None:
                w = np.exp(old[i, t]) / np.exp(rollout[i, t])
                out.capped[i, t] = w > tis_cap
                product *= clamp(w, None, tis_cap)
        k, lam = positive if a >= 0 else negative
        phi = product**k * np.exp(lam * (1 - product))
        out.gradient[i, at] = -phi * a * factor[i, at]
    return out


def dppo(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    divergence="tv",
    threshold=0.15,
    truncation=None,
):
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        q, p = np.exp(logp[i, t]), np.exp(rollout[i, t])
        distance = {
            "tv": abs(p - q),
            "kl": p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)),
        }[divergence]
        rho = q / p
        out.capped[i, t] = truncation is not None and rho > truncation
        out.silent[i, t] = distance > threshold and ((a > 0 and rho > 1) or (a < 0 and rho < 1))
        if not out.silent[i, t]:
            out.gradient[i, t] = -clamp(rho, None, truncation) * a * factor[i, t]
    return out


def m2po(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    moment="mismatch",
    threshold=0.04,
):
    out = blank(mask)
    kept = [(i, t) for i, t in np.argwhere(mask)]
    d = {"mismatch": rollout - old, "full": logp - rollout}[moment]
    while kept and np.mean([d[at] ** 2 for at in kept]) >= threshold:
        kept.remove(max(kept, key=lambda at: d[at] ** 2))
    for i, t, a in tokens(advantages, mask):
        r = np.exp(logp[i, t]) / np.exp(old[i, t])
        out.silent[i, t] = (i, t) not in kept
        if not out.silent[i, t]:
            out.gradient[i, t] = -r * a * factor[i, t]
    return out


def bapo_bounds(
    logp,
    old,
    rollout,
    advantages,
    mask,
    *,
    form="paper",
    low=(0.6, 0.9, 0.02),
    high=(1.2, 3.0, 0.05),
    target=0.4,
):
    """Returns the first bounds, on the way to the last ones, that give positives their share."""

    def enough(c_low, c_high):
        positive = negative = 0.0
        for i, t, a in tokens(advantages, mask):
            r = np.exp(logp[i, t]) / np.exp(old[i, t])
            p = np.exp(rollout[i, t]) if form == "paper" else 1.0
            if a > 0:
                positive += p * abs(min(r * a, clamp(r, 0, c_high) * a))
            elif a < 0:
                negative += p * abs(min(r * a, clamp(r, c_low, c_high) * a))
        return positive >= target * (positive + negative if form == "paper" else negative)

    grid = lambda start, end, step: [  # noqa: E731
        start + k * step for k in range(int(np.floor((end - start) / step + 1e-6)) + 1)
    ]
    lows, highs = grid(*low), grid(*high)
    if form == "paper":
        path = [(lows[0], x) for x in highs] + [(x, highs[-1]) for x in lows[1:]]
    else:
        path = [(x, highs[0]) for x in lows] + [(lows[-1], x) for x in highs[1:]]
    return next((pair for pair in path if enough(*pair)), path[-1])


def bapo(logp, old, rollout, advantages, mask, factor, *, dual_clip=None, **options):
    """PPO with the bounds that the search finds; `form="code"` always has a dual clip."""
    arrays = (logp, old, rollout, advantages, mask)
    c_low, c_high = bapo_bounds(*arrays, **options)
    return ppo(*arrays, factor, clip_low=1 - c_low, clip_high=c_high - 1, dual_clip=dual_clip)


def cpgd(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    clip_low=0.2,
    clip_high=0.2,
    drift=1e-3,
    drift_cap=2.0,
):
    """The clipped log-probability is a constant; the drift pulls clipped tokens back as well."""
    out = blank(mask)
    for i, t, a in tokens(advantages, mask):
        r = np.exp(logp[i, t]) / np.exp(old[i, t])
        out.silent[i, t] = outside(r, a, 1 - clip_low, 1 + clip_high)
        out.capped[i, t] = r - 1 > drift_cap
        pull = drift * clamp(r - 1, None, drift_cap)
        out.gradient[i, t] = ((0.0 if out.silent[i, t] else -a) + pull) * factor[i, t]
    return out


def capo(
    logp,
    old,
    rollout,
    advantages,
    mask,
    factor,
    *,
    head,
    hessian=(-0.01, 0.01),
    fisher=1e-4,
    discount=1.0,
    clip_low=0.2,
    clip_high=0.2,
):
    """PPO on tokens whose simulated update is safe, with the matrices of the paper written out.

    It takes one more argument than the others, so it is not in GRADIENTS.
    """
    hidden, weight, step, actions, temperature = head
    out = ppo(logp, old, rollout, advantages, mask, factor, clip_low=clip_low, clip_high=clip_high)
    for i, at in rows(mask):
        for k, t in enumerate(at):
            logits = hidden[i, t] @ weight / temperature
            policy = np.exp(logits) / np.exp(logits).sum()
            score = np.eye(len(policy))[actions[i, t]] - policy
            information = np.diag(policy) - np.outer(policy, policy)
            h = hidden[i, t] / temperature
            g = np.einsum("d,v->dv", h, score)
            second = np.einsum("d,e,vw->dvew", h, h, np.outer(score, score) - information)
            outer = np.einsum("dv,ew->dvew", g, g)
            scale = discount**k * advantages[i]
            m_h = scale * np.einsum("dv,dv", g, step)
            m_h += scale * np.einsum("dv,dvew,ew", step, second, step) / 2
            m_f = np.einsum("dv,dvew,ew", step, outer, step) / 2
            if not (hessian[0] <= m_h <= hessian[1] and m_f <= fisher):
                out.silent[i, t] = True
                out.gradient[i, t] = 0.0
    return out


GRADIENTS = {
    f.__name__: f
    for f in (
        minirl,
        reinforce,
        dro,
        ppo,
        cispo,
        minpro,
        gspo,
        luspo,
        gmpo,
        sapo,
        vespo,
        dppo,
        m2po,
        bapo,
        cpgd,
    )
}


# Values of losses that are true functions of logp: value[i, t] before aggregation.


def ppo_value(logp, old, rollout, advantages, mask, *, clip_low=0.2, clip_high=0.2, dual_clip=None):
    out = np.zeros(mask.shape)
    for i, t, a in tokens(advantages, mask):
        r = np.exp(logp[i, t]) / np.exp(old[i, t])
        out[i, t] = -min(r * a, clamp(r, 1 - clip_low, 1 + clip_high) * a)
        if dual_clip is not None and a < 0:
            out[i, t] = min(out[i, t], -dual_clip * a)
    return out


def gspo_value(logp, old, rollout, advantages, mask, *, clip_low=3e-4, clip_high=4e-4):
    out = np.zeros(mask.shape)
    for i, at in rows(mask):
        s, a = sequence_ratio(logp, old, i, at), advantages[i]
        out[i, at] = -min(s * a, clamp(s, 1 - clip_low, 1 + clip_high) * a)
    return out


def luspo_value(logp, old, rollout, advantages, mask, *, clip_low=2e-3, clip_high=2.5e-3):
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return mask.sum(1)[:, None] * gspo_value(logp, old, rollout, advantages, mask, **clip)


def gmpo_value(logp, old, rollout, advantages, mask, *, clip_low=0.4, clip_high=0.4):
    out = np.zeros(mask.shape)
    for i, at in rows(mask):
        a, product = advantages[i], 1.0
        for t in at:
            r = np.exp(logp[i, t]) / np.exp(old[i, t])
            clipped = clamp(r, np.exp(-clip_low), np.exp(clip_high))
            product *= min(r, clipped) if a > 0 else max(r, clipped)
        out[i, at] = -a * product ** (1 / len(at))
    return out


def sapo_value(
    logp,
    old,
    rollout,
    advantages,
    mask,
    *,
    temperature_high=1.0,
    temperature_low=1.05,
):
    out = np.zeros(mask.shape)
    for i, t, a in tokens(advantages, mask):
        r = np.exp(logp[i, t]) / np.exp(old[i, t])
        tau = temperature_high if a > 0 else temperature_low
        out[i, t] = -4 / tau / (1 + np.exp(-tau * (r - 1))) * a
    return out


def dro_value(logp, old, rollout, advantages, mask, *, beta=0.05):
    out = np.zeros(mask.shape)
    for i, t, a in tokens(advantages, mask):
        out[i, t] = -(a * logp[i, t] - beta / 2 * (logp[i, t] - old[i, t]) ** 2)
    return out


def m2po_value(logp, old, rollout, advantages, mask, **options):
    kept = ~m2po(logp, old, rollout, advantages, mask, np.ones(mask.shape), **options).silent
    out = np.zeros(mask.shape)
    for i, t, a in tokens(advantages, mask & kept):
        out[i, t] = -np.exp(logp[i, t]) / np.exp(old[i, t]) * a
    return out


VALUES = {
    "ppo": ppo_value,
    "gspo": gspo_value,
    "luspo": luspo_value,
    "gmpo": gmpo_value,
    "sapo": sapo_value,
    "dro": dro_value,
    "m2po": m2po_value,
}


# Factors of the corrections, from the weights w = p_old / p_rollout of single tokens.


def token_factor(function):
    def factor(logp, old, rollout, advantages, mask, **options):
        out = np.zeros(mask.shape)
        for i, t in np.argwhere(mask):
            out[i, t] = function(np.exp(old[i, t]) / np.exp(rollout[i, t]), **options)
        return out

    return factor


def sequence_factor(function):
    """`function` gets the weights of one response's tokens."""

    def factor(logp, old, rollout, advantages, mask, **options):
        out = np.zeros(mask.shape)
        for i, at in rows(mask):
            out[i, at] = function(np.exp(old[i, at]) / np.exp(rollout[i, at]), **options)
        return out

    return factor


def token_tis(w, cap=2.0, floor=None):
    return clamp(w, floor, cap)


def sequence_tis(w, cap=2.0):
    return min(np.prod(w), cap)


def icepop(w, low=0.5, high=5.0, weigh=True):
    return (w if weigh else 1.0) if low <= w <= high else 0.0


def sequence_mis(w, low=0.0, high=3.0, weigh=True):
    return icepop(np.prod(w), low, high, weigh)


def geometric_mask(w, low=0.999, high=1.001):
    return float(low <= np.prod(w) ** (1 / len(w)) <= high)


def veto(w, threshold=1e-4):
    return float(min(w) >= threshold)


def off_policy_sequence_mask(logp, old, rollout, advantages, mask, *, delta=0.5):
    """DeepSeek-V3.2: a bad response that the policy has moved away from is dropped."""
    out = np.zeros(mask.shape)
    for i, at in rows(mask):
        drift = sum(rollout[i, t] - logp[i, t] for t in at) / len(at)
        out[i, at] = 0.0 if advantages[i] < 0 and drift > delta else 1.0
    return out


def normalized_token_tis(logp, old, rollout, advantages, mask, *, cap=2.0):
    factor = token_factor(token_tis)(logp, old, rollout, advantages, mask, cap=cap)
    return factor / (factor.sum() / mask.sum())


def normalized_sequence_tis(logp, old, rollout, advantages, mask, *, cap=2.0):
    """The mean is over responses: a long one counts once."""
    factor = sequence_factor(sequence_tis)(logp, old, rollout, advantages, mask, cap=cap)
    return factor / np.mean([factor[i, at[0]] for i, at in rows(mask)])


FACTORS = {
    "token_tis": token_factor(token_tis),
    "icepop": token_factor(icepop),
    "sequence_tis": sequence_factor(sequence_tis),
    "sequence_mis": sequence_factor(sequence_mis),
    "geometric_mask": sequence_factor(geometric_mask),
    "veto": sequence_factor(veto),
    "off_policy_sequence_mask": off_policy_sequence_mask,
    "normalized_token_tis": normalized_token_tis,
    "normalized_sequence_tis": normalized_sequence_tis,
}
