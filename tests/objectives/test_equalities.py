"""Objectives that are equal in a limit, and objectives that must never be equal.

Gradients are compared, not values: `r A` and `sg[r] A log π` differ as numbers and agree as slopes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import corrections, objectives
from jaxrl_stable.objectives import aggregate, divide
from tests.objectives.inputs import B, Inputs, T, make_batches, stack, to_jax

SUM, MEAN, TOKEN = "seq-mean-token-sum", "seq-mean-token-mean", "token-mean"
HUGE, HORIZON = 1e9, 20
WIDE = {"mismatch": 1.0, "staleness": 0.4}
FAR = {"staleness": 1.0, "shift": 0.9}


def member(name, mode=SUM, correction=None, old="old", **options):
    """Returns a function from a list of inputs to their aggregated gradients, in float64.

    `old` says which policy takes the place of the old one: "rollout" is the bypass form, None the
    current policy. `correction` is a name with options.
    """

    def loss(logp, *rest):
        logp_old = dict(zip(("old", "rollout"), rest)).get(old)
        arrays = (logp_old, *rest[1:])
        out = getattr(objectives, name)(logp, *arrays, **options)
        if correction:
            factor_name, factor_options = correction
            factor = getattr(corrections, factor_name)(logp, *arrays, **factor_options)
            out = corrections.correct(out, factor)
        return divide(*aggregate(out.loss, rest[-1], mode, HORIZON))

    def gradients(batches):
        with jax.enable_x64(True):
            return np.asarray(jax.vmap(jax.grad(loss))(*to_jax(stack(batches), jnp.float64)))

    return gradients


def difference(one, other, batches):
    """Returns the largest difference, relative to the largest entry."""
    one, other = one(batches), other(batches)
    return np.abs(one - other).max() / np.abs(other).max()


def largest_difference(one, other, change=lambda inputs: inputs, **scale):
    return difference(one, other, [change(inputs) for inputs in make_batches(**scale)])


current_is_old = lambda inputs: inputs._replace(old=inputs.logp)  # noqa: E731

tis_of_ppo = functools.partial(member, "ppo", clip_low=0.2, clip_high=0.27)
bypass_reinforce = functools.partial(
    member, "reinforce", old=None, correction=("token_tis", {"cap": 5.0})
)
sequence_form = functools.partial(member, "gspo", MEAN)

# name: (one, other, the inputs' scale)
EQUAL = {
    "MiniRL without truncation is w times PPO": (
        member("minirl", truncation=None),
        tis_of_ppo(correction=("token_tis", {"cap": HUGE})),
        WIDE,
    ),
    "MiniRL whose truncation does not bite is w times PPO": (
        member("minirl"),
        tis_of_ppo(correction=("token_tis", {"cap": 5.0})),
        {"mismatch": 0.1, "staleness": 0.3},
    ),
    "MiniRL without clip is REINFORCE in the bypass form": (
        member("minirl", clip=False),
        bypass_reinforce(),
        WIDE,
    ),
    "MiniRL without clip is CISPO in the bypass form": (
        member("minirl", clip=False),
        member("cispo", old="rollout", clip_low=None, clip_high=4.0),
        WIDE,
    ),
    "MiniRL without clip is DPPO that never masks": (
        member("minirl", clip=False),
        member("dppo", threshold=HUGE, truncation=5.0),
        WIDE,
    ),
    "MiniRL anchored at the rollout is PPO in the bypass form": (
        member("minirl", clip_anchor="rollout", truncation=None),
        member("ppo", old="rollout", clip_low=0.2, clip_high=0.27),
        WIDE,
    ),
    "MiniRL without weight is CPGD without drift": (
        member("minirl", weight="none", clip_high=0.2),
        member("cpgd", drift=0.0),
        WIDE,
    ),
    "GSPO's forms": (
        sequence_form(),
        sequence_form(form="token"),
        {"staleness": 1e-3},
    ),
    "GSPO's forms, token mean": (
        member("gspo", TOKEN),
        member("gspo", TOKEN, form="token"),
        {"staleness": 1e-3},
    ),
    "CISPO's lower bound of 1 is none": (
        member("cispo", TOKEN, clip_low=1.0, clip_high=4.0),
        member("cispo", TOKEN),
        FAR,
    ),
    "a dual clip far out is none": (
        member("ppo", dual_clip=HUGE),
        member("ppo"),
        FAR,
    ),
    "Dr.GRPO's horizon is a constant": (
        lambda batches: HORIZON * member("ppo", "seq-mean-token-sum-norm")(batches),
        member("ppo", SUM),
        {},
    ),
    "DRO without beta is REINFORCE": (member("dro", beta=0.0), member("reinforce"), {}),
    "M2PO that drops nothing is PPO without clip": (
        member("m2po", threshold=HUGE),
        member("ppo", clip_low=1 - 1e-9, clip_high=HUGE),
        WIDE,
    ),
    "BAPO with one pair of bounds is PPO": (
        member("bapo", low=(0.7, 0.7, 0.1), high=(1.3, 1.3, 0.1)),
        member("ppo", clip_low=0.3, clip_high=0.3),
        {},
    ),
    "IcePop without bounds is TIS without cap": (
        member("ppo", correction=("icepop", {"low": 0.0, "high": HUGE})),
        member("ppo", correction=("token_tis", {"cap": HUGE})),
        WIDE,
    ),
    "sequence MIS without bounds is sequence TIS without cap": (
        member("ppo", correction=("sequence_mis", {"high": HUGE})),
        member("ppo", correction=("sequence_tis", {"cap": HUGE})),
        WIDE,
    ),
}

DIFFERENT = {
    "truncating w is not truncating ρ (C = 5)": (
        member("minirl"),
        tis_of_ppo(correction=("token_tis", {"cap": 5.0})),
        {"mismatch": 1.0, "staleness": 1.0},
    ),
    "truncating w is not truncating ρ (C = 1.5)": (
        member("minirl", truncation=1.5),
        tis_of_ppo(correction=("token_tis", {"cap": 1.5})),
        WIDE,
    ),
    "MiniRL corrects the engines": (member("minirl"), tis_of_ppo(), WIDE),
    "the anchor of the clip": (
        member("minirl", clip_anchor="rollout"),
        member("minirl"),
        WIDE,
    ),
    "DAPO's mean and GRPO's": (member("ppo", TOKEN), member("ppo", MEAN), {}),
    "DPPO masks by distance, not by ratio": (
        member("dppo"),
        member("ppo", old="rollout", clip_low=0.15, clip_high=0.15),
        WIDE,
    ),
    "DPPO's divergences": (
        member("dppo", divergence="kl", threshold=0.05),
        member("dppo"),
        WIDE,
    ),
    "CISPO keeps what PPO drops": (
        member("cispo", clip_low=0.2, clip_high=0.2),
        member("ppo"),
        {},
    ),
    "MinPRO looks at the prefix": (member("minpro"), member("cispo"), {}),
    "a response's ratio is no token's": (
        member("gspo", MEAN, clip_low=0.2, clip_high=0.2),
        member("ppo", MEAN),
        {},
    ),
    "GMPO clips tokens, GSPO responses": (
        member("gmpo", MEAN),
        member("gspo", MEAN, clip_low=1 - np.exp(-0.4), clip_high=np.exp(0.4) - 1),
        {"staleness": 0.8},
    ),
    "the two moments of M2PO": (
        member("m2po", moment="full"),
        member("m2po"),
        {"mismatch": 0.4},
    ),
    "the two searches of BAPO": (
        member("bapo", form="code", target=0.5, dual_clip=None),
        member("bapo", target=0.5),
        FAR,
    ),
    "the clipped ratio of PPO never multiplies CPGD's gradient": (
        member("cpgd", drift=0.0),
        member("ppo"),
        {},
    ),
    "a token's weight is no response's": (
        member("ppo", correction=("sequence_tis", {})),
        member("ppo", correction=("token_tis", {})),
        WIDE,
    ),
    "IcePop drops what TIS keeps": (
        member("ppo", correction=("icepop", {})),
        member("ppo", correction=("token_tis", {"cap": 5.0})),
        WIDE,
    ),
    "normalising changes the scale": (
        member("ppo", correction=("normalized_token_tis", {})),
        member("ppo", correction=("token_tis", {})),
        WIDE,
    ),
}

ON_POLICY = {
    "GRPO": ("ppo", {}),
    "CISPO": ("cispo", {}),
    "MinPRO": ("minpro", {}),
    "GSPO": ("gspo", {}),
    "GSPO, token form": ("gspo", {"form": "token"}),
    "GMPO": ("gmpo", {}),
    "SAPO": ("sapo", {}),
    "SAPO, other temperatures": ("sapo", {"temperature_high": 3.0, "temperature_low": 0.2}),
    "VESPO": ("vespo", {}),
    "M2PO": ("m2po", {"threshold": HUGE}),
    "BAPO": ("bapo", {}),
    "CPGD": ("cpgd", {}),
    "DRO": ("dro", {}),
    "MiniRL without weight": ("minirl", {"weight": "none"}),
}


@pytest.mark.parametrize("claim", EQUAL)
def test_equal(claim):
    one, other, scale = EQUAL[claim]
    assert largest_difference(one, other, **scale) < 1e-9


@pytest.mark.parametrize("claim", DIFFERENT)
def test_different(claim):
    one, other, scale = DIFFERENT[claim]
    assert largest_difference(one, other, **scale) > 0.1


@pytest.mark.parametrize("claim", ON_POLICY)
def test_the_old_policy_itself_gives_reinforce(claim):
    name, options = ON_POLICY[claim]
    one, other = member(name, MEAN, **options), member("reinforce", MEAN)
    assert largest_difference(one, other, current_is_old, mismatch=0.5) < 1e-9


def test_the_rollout_policy_itself_gives_reinforce():
    equal_engines = lambda inputs: inputs._replace(rollout=inputs.logp)  # noqa: E731
    one, other = member("dppo"), member("reinforce")
    assert largest_difference(one, other, equal_engines) < 1e-9
    # MiniRL needs both.
    everything = lambda inputs: equal_engines(current_is_old(inputs))  # noqa: E731
    assert largest_difference(member("minirl"), other, everything) < 1e-9


def test_luspo_is_gspo_times_length():
    luspo, gspo = member("luspo", MEAN), member("gspo", MEAN, clip_low=2e-3, clip_high=2.5e-3)
    batches = make_batches(staleness=6e-3)
    lengths = np.array([inputs.mask.sum(1) for inputs in batches])[..., None]
    np.testing.assert_allclose(luspo(batches), gspo(batches) * lengths, rtol=1e-9)
    assert difference(luspo, gspo, batches) > 0.1


def test_dapo_is_grpo_when_all_responses_are_as_long():
    def even(inputs):
        clean = [np.where(np.abs(x) < 100, x, -1.0) for x in inputs[:3]]
        return Inputs(*clean, inputs.advantages, np.broadcast_to(np.arange(T) < 6, (B, T)))

    assert largest_difference(member("ppo", TOKEN), member("ppo", MEAN), even) < 1e-9


def test_minpro_is_cispo_while_no_prefix_has_fallen():
    """Prefix minima are 1 if every first token is as likely as before, and none is less likely."""

    def risen(inputs):
        logp = np.where(inputs.logp < inputs.old, inputs.old, inputs.logp)
        for i, row in enumerate(inputs.mask):
            logp[i, np.argmax(row)] = inputs.old[i, np.argmax(row)]
        return inputs._replace(logp=logp)

    assert largest_difference(member("minpro"), member("cispo"), risen, **FAR) < 1e-9


def test_minpro_of_first_tokens_is_cispo():
    first = lambda inputs: inputs._replace(mask=inputs.mask & (np.arange(T) == 0))  # noqa: E731
    assert largest_difference(member("minpro"), member("cispo"), first, **FAR) < 1e-9


def test_ratio_form_and_score_form_have_other_values():
    arrays = to_jax(stack(make_batches()), jnp.float32)
    ratio_form = jax.vmap(objectives.ppo)(*arrays).loss.sum((1, 2))
    weightless = lambda *arrays: objectives.minirl(*arrays, weight="none").loss  # noqa: E731
    assert np.abs(ratio_form - jax.vmap(weightless)(*arrays).sum((1, 2))).max() > 1.0
