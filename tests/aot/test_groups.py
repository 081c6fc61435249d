"""Replica groups in the three forms that XLA prints."""

import numpy as np
import pytest

from jaxrl_stable.aot.groups import replica_groups


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("dimensions={0}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4,'b'=1] {'a','b'}", [[0, 1, 2, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x=1",
            [[0, 2], [1, 3]],
        ),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x=1", [[0, 1], [2, 3]]),
    ],
)
def test_forms(text, expected):
    np.testing.assert_array_equal(replica_groups(text, 4), expected)


def test_another_form_is_an_error():
    with pytest.raises(ValueError, match="unknown form of replica_groups=ring"):
        replica_groups("replica_groups=ring(4), x=1", 4)
