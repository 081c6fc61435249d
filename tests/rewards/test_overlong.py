import numpy as np
import pytest

from jaxrl_stable.rewards import overlong_penalty


@pytest.mark.fast
def test_dapo_by_hand():
    """DAPO's own numbers: limit 20,480, buffer 4,096."""
    lengths = [1, 16384, 16385, 18432, 20480, 20481]
    expected = [0, 0, -1 / 4096, -0.5, -1, -1]
    np.testing.assert_allclose(overlong_penalty(lengths, 20480, 4096), expected, atol=1e-7)


@pytest.mark.fast
def test_without_a_buffer_only_what_is_too_long_is_punished():
    np.testing.assert_array_equal(overlong_penalty([9, 10, 11], 10, 0), [0, 0, -1])
    with pytest.raises(ValueError, match="buffer is 11; use 0 to limit"):
        overlong_penalty([1], 10, 11)
