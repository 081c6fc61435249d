"""BOS and EOS of the forms in which tokenizers are published; published.json is transformers'."""

import json
import pathlib

import numpy as np
import pytest
from absl import logging

from jaxrl_stable import data
from jaxrl_stable.data.tokenizer import special_tokens
from jaxrl_stable.run.task import _checksum
from tests.data import published

EXPECTED = json.loads(pathlib.Path(__file__).with_name("published.json").read_text())
PROBLEM = {"prompt": "Hi", "answer": ""}

pytestmark = pytest.mark.fast


@pytest.fixture
def warned(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    return said


@pytest.mark.parametrize("name", published.FORMS)
def test_plain_prompts_start_as_in_transformers(name, tmp_path, warned):
    form, expected = published.FORMS[name], EXPECTED[name]
    published.write(tmp_path, form)
    tokenizer = data.load_tokenizer(tmp_path)
    ids = expected["ids"][: -form.end or None]  # a prompt that ends with EOS has no response
    assert data.prompt_ids(PROBLEM, tokenizer) == ids
    prefix = ids[: ids.index(tokenizer.encode("H")[0])]
    assert tokenizer.prefix_ids == tuple(prefix)
    assert tokenizer.bos_id == (prefix[0] if len(prefix) == 1 else None)
    tokens, mask = data.encode_prompts([PROBLEM], tokenizer, 6)
    np.testing.assert_array_equal(tokens[mask], ids)
    if expected["eos"] is not None:  # without any configuration, the usual names are tried
        assert tokenizer.decode([tokenizer.eos_id]) == ""
        assert tokenizer.encode(expected["eos"]) == [tokenizer.eos_id]
    contradicts = name in ("deepseek-v3", "a flag that is false")
    assert len(warned) == contradicts, warned


@pytest.mark.parametrize(
    ("name", "start"), [("deepseek-v3", "no token"), ("a flag that is false", "['<s>']")]
)
def test_a_flag_without_effect_is_said(name, start, tmp_path, warned):
    published.write(tmp_path, published.FORMS[name])
    data.load_tokenizer(tmp_path)
    (said,) = warned
    assert said.startswith(f"{tmp_path / 'tokenizer.json'}: add_bos_token = ")
    assert f"has no effect; plain prompts start with {start}, as in" in said and "\n" not in said


def test_tokens_of_both_files(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))

    file = tmp_path / "tokenizer.json"
    assert special_tokens(file) == {}
    config = {"eos_token": {"content": "a"}, "pad_token": "b", "unk_token": "c", "model_max": 3}
    write("tokenizer_config.json", config | {"add_bos_token": True, "chat_template": "x"})
    assert special_tokens(file) == {"eos_token": "a", "pad_token": "b", "unk_token": "c"}
    write("special_tokens_map.json", {"eos_token": "d", "pad_token": None, "bos_token": "e"})
    both = {"eos_token": "d", "pad_token": None, "unk_token": "c", "bos_token": "e"}
    assert special_tokens(file) == both
    write("tokenizer_config.json", config | {"added_tokens_decoder": {}})
    assert special_tokens(file) == {"eos_token": "a", "pad_token": "b", "unk_token": "c"}
    (tmp_path / "special_tokens_map.json").write_text("[]")
    write("tokenizer_config.json", config)
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: not a JSON object"):
        special_tokens(file)


def test_usual_names_are_tried_unless_there_is_a_configuration(tmp_path):
    published.write(tmp_path, published.Form("bytes", None, {"unk_token": "<pad>"}))
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.encode("</s><pad>") == [tokenizer.eos_id, tokenizer.pad_id]
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    with pytest.raises(ValueError, match="the EOS token is unknown"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["map over config", "map"])  # BOS is null there, or not named
def test_a_chat_template_takes_its_tokens_from_both_files(name, tmp_path):
    published.write(tmp_path, published.FORMS[name])
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    (tmp_path / "chat_template.jinja").write_text(source)
    template = data.load_chat_template(tmp_path)
    assert template.render(PROBLEM) == "<s>Hi</s>"
    # A token that only the map names, and that the template does not use, changes no identity.
    before = repr(template)
    path = tmp_path / "special_tokens_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": "<pad>"}))
    assert repr(data.load_chat_template(tmp_path)) == before


def test_a_second_file_changes_the_identity_only_with_the_tokens(tmp_path):
    """Runs of earlier versions, which ignored it, can be resumed if it repeats the first file."""
    published.write(tmp_path, published.Form("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}))
    file, path = tmp_path / "special_tokens_map.json", tmp_path / "tokenizer.json"
    before = [_checksum(path), _checksum(tmp_path)]
    for repeated in (
        {"eos_token": {"content": "</s>"}},
        {"bos_token": "<pad>"},
        {"unk_token": "a"},
    ):
        file.write_text(json.dumps(repeated))
        assert [_checksum(path), _checksum(tmp_path)] == before, repeated
    for other in ({"eos_token": "<|im_end|>"}, {"pad_token": "<pad>"}):
        file.write_text(json.dumps(other))
        after = [_checksum(path), _checksum(tmp_path)]
        assert not set(after) & set(before), other
