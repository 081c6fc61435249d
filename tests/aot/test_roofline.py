"""Figures computed by hand: times of each resource, the bound, model FLOPs, topologies."""

import dataclasses

import pytest

from jaxrl_stable.aot.collectives import Collective
from jaxrl_stable.aot.flops import forward_flops, matrix_sizes
from jaxrl_stable.aot.roofline import roofline
from jaxrl_stable.aot.topology import CHIPS, parse_topology
from jaxrl_stable.model.config import qwen3_30b_a3b, tiny

V5E = CHIPS["v5e"]
PLACES = [(x, y, 0) for x in range(4) for y in range(4)]


def gather(group, sent, **changes):
    collective = Collective("all-gather", "ici", (), group, len(group), sent, 1, "", "")
    return dataclasses.replace(collective, **changes)


def test_the_slowest_resource_is_the_bound():
    times = roofline(V5E, flops=197e12, hbm_bytes=2 * 819e9, found=[], coordinates=PLACES)
    assert times.seconds == {"compute": 1.0, "HBM": 2.0, "ICI": 0.0, "DCN": 0.0}
    assert (times.bound, times.step) == ("HBM", 2.0)
    assert times.mfu(model_flops=197e12 / 2, chip=V5E) == 0.25


@pytest.mark.parametrize(
    "found, seconds",
    [
        ([gather((0, 1, 2, 3), 9e10)], 1.0),  # one dimension: a link each way
        ([gather(tuple(range(16)), 9e10)], 0.5),  # two dimensions
        ([gather((0, 1, 2, 3), 9e10, times=3)], 3.0),
        ([gather((0, 1), 4.5e10, kind="collective-permute")], 1.0),  # one link, one way
        ([gather((0, 1, 2, 3), 9e10), gather((0, 4, 8, 12), 9e10)], 2.0),
        ([gather((0,), 0.0)], 0.0),
    ],
)
def test_collectives_use_the_links_of_their_dimensions(found, seconds):
    assert roofline(V5E, 0.0, 0.0, found, PLACES).ici == seconds


def test_slices_talk_over_the_network():
    found = [gather((), 6.25e9, network="dcn", times=2)]
    times = roofline(V5E, 0.0, 0.0, found, PLACES)
    assert (times.ici, times.dcn, times.bound) == (0.0, 4.0, "DCN")


def test_model_flops_by_hand():
    config = tiny()  # D 64, H 4, G 2, hd 16, E 8, K 2, F 64, V 128, tied; 2 layers
    attention = 64 * (4 + 2 + 2) * 16 + 4 * 16 * 64
    experts = 2 * 3 * 64 * 64 + 64 * 8  # two of eight, and the router
    assert matrix_sizes(config) == (2 * (attention + experts), 64 * 128)
    rows, columns, scored = 3, 10, 4
    body, head = matrix_sizes(config)
    pairs = 10 * 10 / 2
    expected = 2 * rows * (columns * body + scored * head + 2 * 2 * 4 * 16 * pairs)
    assert forward_flops(config, rows, columns, scored) == expected


def test_a_cached_token_attends_to_all_before_it():
    config = tiny()
    body, head = matrix_sizes(config)
    expected = 2 * 5 * (body + head + 2 * 4 * 32 * (100 + 0.5))
    assert forward_flops(config, 5, columns=1, scored=1, past=100) == expected


def test_active_parameters_of_qwen3_30b_a3b():
    """Its name says 3 billion. It has 3.35 with the embedding, which is only looked up."""
    body, head = matrix_sizes(qwen3_30b_a3b())
    assert body + 2 * head == pytest.approx(3.35e9, rel=0.01)


def test_topologies():
    assert parse_topology("v5p:4x4x8").chips == 128
    two = parse_topology("v5e:16x16*2")
    assert (two.chips, two.slice_size, two.slices, two.shape) == (512, 256, 2, (16, 16))


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5p:4x4", "has 2 dimensions; slices of v5p have 3"),
        ("h100:8", "one of v5e, v5p, v6e"),
        ("v5e16x16", "write chip:AxB"),
        ("v5e:16x16*two", r"followed by \*N"),
    ],
)
def test_a_topology_that_is_none_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)
