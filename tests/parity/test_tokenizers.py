"""Agreement with transformers on what prompts start with, over forms, classes and architectures.

Needs transformers (the extra "parity").
"""

import itertools
import json

import pytest

HINT = "needs torch and transformers 5.24: pip install -e '.[test,parity]'"
transformers = pytest.importorskip("transformers", minversion="5.24", reason=HINT)

from jaxrl_stable import data  # noqa: E402
from tests.data import make_published_fixtures, published  # noqa: E402  (it needs transformers)

EXPECTED = json.loads(make_published_fixtures.FILE.read_text())
CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer")
CLASSES += ("PreTrainedTokenizerFast", "TokenizersBackend", "GPTNeoXTokenizerFast")
MODELS = ("qwen3", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3")


@pytest.mark.parametrize("name", published.FORMS)
def test_the_frozen_results_are_those_of_this_version(name):
    assert make_published_fixtures.observed(published.FORMS[name]) == EXPECTED[name]


@pytest.mark.parametrize("post", [None, "bytes", "<s> $A", "[gMASK] <s> $A"])
@pytest.mark.parametrize("model", MODELS)
def test_plain_prompts_start_as_in_transformers(model, post, tmp_path):
    flags = ({}, {"add_bos_token": True}, {"add_bos_token": False})
    for kind, flag in itertools.product(CLASSES, flags):
        # Mixtral's registered class wins there; OLMoE's is GPTNeoXTokenizer without a name.
        if (model, kind) in (("mixtral", "GPTNeoXTokenizerFast"), ("olmoe", None)):
            continue
        config = {"bos_token": "<s>", "eos_token": "</s>"} | flag
        config |= {} if kind is None else {"tokenizer_class": kind}
        published.write(tmp_path, published.Form(post, config))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = data.prompt_ids({"prompt": "Hi", "answer": ""}, data.load_tokenizer(tmp_path))
        assert ours == theirs.encode("Hi"), (kind, flag)
