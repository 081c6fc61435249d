"""Agreement, load and confidence of the routers, computed by hand."""

import jax.numpy as jnp
import pytest

from jaxrl_stable import diagnostics
from jaxrl_stable.diagnostics import finalize


def values(metrics):
    return {name: float(value) for name, value in finalize(metrics).items()}


@pytest.mark.fast
def test_routing_agreement_by_hand():
    """Two layers: the first token differs in layer 1, the second in none; the third is invalid."""
    agreement = jnp.array([[[1.0, 1.0, 0.0]], [[0.5, 1.0, 0.0]]])
    got = values(diagnostics.routing_metrics(agreement, jnp.array([[True, True, False]])))
    assert got["routing/agreement"] == pytest.approx(3.5 / 4)
    assert got["routing/agreement_layer_00"] == 1.0
    assert got["routing/agreement_layer_01"] == pytest.approx(0.75)
    assert got["routing/differing_tokens_share"] == pytest.approx(0.5)
    assert got["routing/zero_overlap_share"] == 0.0


@pytest.mark.fast
def test_choices_without_a_common_expert():
    """It counts pairs of layer and token, one in six here, although half of the tokens differ."""
    agreement = jnp.array([[[0.0, 1.0]], [[0.5, 1.0]], [[0.5, 1.0]]])
    got = values(diagnostics.routing_metrics(agreement, jnp.ones((1, 2), bool)))
    assert got["routing/zero_overlap_share"] == pytest.approx(1 / 6)
    assert got["routing/differing_tokens_share"] == pytest.approx(1 / 2)


@pytest.mark.fast
def test_expert_load_by_hand():
    load = jnp.array([[6.0, 2.0, 0.0, 0.0]])
    confidence = jnp.array([[[0.5, 0.7, 0.0]]])
    got = values(diagnostics.load_metrics(load, confidence, jnp.array([[True, True, False]])))
    assert got["experts/max_violation"] == pytest.approx(6 / 8 * 4 - 1)
    assert got["experts/min_violation"] == -1.0
    assert got["experts/avg_violation"] == pytest.approx((2 + 0 + 1 + 1) / 4)
    assert got["experts/idle_share"] == pytest.approx(0.5)
    assert got["experts/confidence"] == pytest.approx(0.6)
    assert "experts/load" not in got


@pytest.mark.fast
def test_violations_of_an_even_and_of_a_collapsed_layer():
    """Layers give 0, 0, 0 and 3, −1, 1.5; they have equal weights, whatever their load."""
    load = jnp.array([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 80.0, 0.0]])
    confidence, real = jnp.ones((2, 1, 2)), jnp.ones((1, 2), bool)
    got = values(diagnostics.load_metrics(load, confidence, real))
    assert got["experts/max_violation"] == 3.0
    assert got["experts/min_violation"] == -1.0
    assert got["experts/avg_violation"] == 0.75


@pytest.mark.fast
def test_imbalance_of_devices():
    """Pairs (8, 2) and (3, 7) on two devices: 8/5 and 7/5; a layer without tokens is left out."""
    load = jnp.array([[6.0, 2.0, 0.0, 2.0], [2.0, 1.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    confidence, real = jnp.ones((3, 1, 2)), jnp.ones((1, 2), bool)
    got = values(diagnostics.load_metrics(load, confidence, real, devices=2))
    assert got["experts/device_imbalance"] == pytest.approx(1.5)
    alone = values(diagnostics.load_metrics(load, confidence, real))
    assert "experts/device_imbalance" not in alone


def test_no_layers_no_metrics():
    valid = jnp.ones((1, 2), bool)
    assert diagnostics.routing_metrics(jnp.zeros((0, 1, 2)), valid) == {}
    assert diagnostics.load_metrics(jnp.zeros((0, 4)), jnp.zeros((0, 1, 2)), valid) == {}
