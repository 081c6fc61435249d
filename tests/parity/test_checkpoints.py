"""Agreement with transformers on checkpoints that have a file or a tensor too many or too few.

Needs torch and transformers (the extra "parity").
"""

import json
import warnings

import numpy as np
import pytest

HINT = "needs torch and transformers 5.24: pip install -e '.[test,parity]'"
pytest.importorskip("torch", reason=HINT)
transformers = pytest.importorskip("transformers", minversion="5.24", reason=HINT)

from jaxrl_stable import hf  # noqa: E402
from tests.hf import ours, raw  # noqa: E402
from tests.hf.test_tied import EMBEDDING, HEAD, float32  # noqa: E402

LATER = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)


def theirs(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32", **options)


def value(parameter):
    return parameter.detach().numpy()


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: None,
        lambda t: t.update({HEAD: t[EMBEDDING]}),
        lambda t: t.update({HEAD: float32(t[EMBEDDING])}),
        lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
    ],
)
def test_tied_embeddings(edit, tmp_path):
    directory = raw.changed("qwen3.v5", tmp_path, edit)
    model, reference = ours.load(directory), theirs(directory)
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    np.testing.assert_array_equal(model.embedding[...], value(reference.lm_head.weight))


@pytest.mark.parametrize("moved", [1, 5, 1 << 20])
def test_a_head_that_differs(moved, tmp_path):
    """Transformers does not tie it, which is the first advice of our error."""

    def edit(tensors):
        tensors[HEAD] = float32(tensors[EMBEDDING], moved)

    reference = theirs(raw.changed("qwen3.v5", tmp_path, edit))
    assert reference.lm_head.weight is not reference.model.embed_tokens.weight
    with pytest.raises(ValueError, match="tie_word_embeddings = true; set it to false"):
        ours.load(tmp_path)
    model = ours.load(raw.changed("qwen3.v5", tmp_path, edit, tie_word_embeddings=False))
    np.testing.assert_array_equal(model.embedding[...], value(reference.model.embed_tokens.weight))
    np.testing.assert_array_equal(model.head[...], value(reference.lm_head.weight).T)


def test_an_index_next_to_a_single_file(tmp_path):
    directory = raw.copied("qwen3-moe.v5", tmp_path)
    tensors = raw.read(directory)
    name = "model.norm.weight"
    tensors[name] = raw.with_value(tensors[name], 123.0, 5)
    raw.write(directory / "model.safetensors", tensors)
    norm = theirs(directory).model.norm.weight
    np.testing.assert_array_equal(ours.load(directory).norm.weight[...], value(norm))
    assert norm[5] == 123.0


def test_a_base_that_would_be_ignored(tmp_path):
    """Transformers takes a default for it, which ours refuses to do."""
    raw.changed("qwen3.v5", tmp_path, rope_scaling=LATER, rope_parameters={"rope_theta": 1e6})
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1e4
    with pytest.raises(ValueError, match=r"rope_theta = 1000000\.0 would be ignored"):
        hf.read_config(tmp_path)
    scaling = LATER | {"rope_theta": 5e5}
    raw.changed("qwen3.v5", tmp_path, rope_scaling=scaling, rope_parameters={"rope_theta": 1e6})
    reference = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert hf.read_config(tmp_path).rope_theta == reference["rope_theta"] == 5e5


CONFIGURATION = """
from transformers import Qwen3Config

class Config(Qwen3Config):
    pass
"""
MODELING = """
from transformers import Qwen3ForCausalLM
from .configuration_own import Config

class LanguageModel(Qwen3ForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("whole", [True, False])
def test_exports_with_code_of_their_own(whole, tmp_path):
    (tmp_path / "like").mkdir()
    auto_map = {
        "AutoConfig": "configuration_own.Config",
        "AutoModelForCausalLM": "modeling_own.LanguageModel",
    }
    like = raw.changed("qwen3.v5", tmp_path / "like", auto_map=auto_map)
    (like / "modeling_own.py").write_text(MODELING)
    if whole:
        (like / "configuration_own.py").write_text(CONFIGURATION)
    hf.save(ours.load(like), tmp_path / "out", like=like)
    with warnings.catch_warnings(action="ignore"):
        model = theirs(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == ("LanguageModel" if whole else "Qwen3ForCausalLM")
    assert ("auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())) == whole
