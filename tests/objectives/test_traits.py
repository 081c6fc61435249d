"""A trait that is set the old way is refused; otherwise it would be silently ignored."""

import pytest

from jaxrl_stable.objectives import traits_of


@pytest.mark.fast
def test_a_trait_set_as_an_attribute_is_refused():
    def loss():
        pass

    assert not traits_of(loss).whole_batch
    loss.whole_batch = True
    with pytest.raises(ValueError, match=r"with @objectives\.traits\(whole_batch=True\)"):
        traits_of(loss)
