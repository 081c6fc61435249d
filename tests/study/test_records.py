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
    with pytest.raises(ValueError, match=r"different Study\.model"):
        identify(
            dataclasses.replace(study, model=dataclasses.replace(study.model, latent=other)),
            tmp_path,
        )


@pytest.mark.fast
def test_a_study_from_before_a_field_existed_goes_on_with_its_default(study, tmp_path):
    """Also in the optimizers inside; another value of the new field is another study."""
    identify(study, tmp_path)
    path, field = tmp_path / "study.json", ", skip_zero_gradients=False"
    new = path.read_text()
    assert new.count(field) == 1 + len(study.cold_starts)
    path.write_text(new.replace(field, ""))
    identify(study, tmp_path)
    assert path.read_text() == new
    path.write_text(new.replace(field, ""))
    for changed in (dict(skip_zero_gradients=True), dict(b1=0.8)):
        optimizer = dataclasses.replace(study.optimizer, **changed)
        with pytest.raises(ValueError, match=r"different Study\.optimizer"):
            identify(dataclasses.replace(study, optimizer=optimizer), tmp_path)
