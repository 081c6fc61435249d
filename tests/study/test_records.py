"""A study is compared with the study.json of its directory."""

import dataclasses

import pytest

from jaxrl_stable.model.config import LatentSizes
from jaxrl_stable.study.records import identify


@pytest.mark.fast
def test_a_study_of_an_older_version_with_latent_attention_goes_on(study, tmp_path):
    """The old study.json has the earlier name of LatentSizes."""
    latent = LatentSizes(key_value_rank=8, rotary_dim=4, value_dim=8)
    study = dataclasses.replace(study, model=dataclasses.replace(study.model, latent=latent))
    identify(study, tmp_path)
    path = tmp_path / "study.json"
    new = path.read_text()
    assert "LatentSizes(" in new
    path.write_text(new.replace("LatentSizes(", "LatentAttention("))
    identify(study, tmp_path)
    assert path.read_text() == new
    other = dataclasses.replace(latent, value_dim=4)
    with pytest.raises(ValueError, match=r"another Study\.model"):
        identify(
            dataclasses.replace(study, model=dataclasses.replace(study.model, latent=other)),
            tmp_path,
        )
