"""Special tokens in the forms in which models are published, around one tiny tokenizer."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[gMASK]"]


class Form(NamedTuple):
    """Files of a tokenizer.

    Attributes:
      post: post-processor in `tokenizer.json`: a template, "bytes", or None.
      config: `tokenizer_config.json`; None if the file does not exist.
      map: `special_tokens_map.json`; None if the file does not exist.
      end: number of tokens that the post-processor puts at the end.
    """

    post: str | None
    config: dict[str, Any] | None
    map: dict[str, Any] | None = None
    end: int = 0


def _added(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text} | flags


def _config(bos: str | None, eos: str = "</s>", **others: Any) -> dict[str, Any]:
    return {"bos_token": bos, "eos_token": eos} | others


_DECODER = {"2": _added("</s>") | {"special": True}}
FORMS = {
    # A BOS that is named and not added.
    "smollm2": Form(
        "bytes", _config("<|im_start|>", "<|im_end|>", tokenizer_class="GPT2Tokenizer")
    ),
    "gpt2, phi-4": Form(
        "bytes", _config("<|endoftext|>", "<|endoftext|>", tokenizer_class="GPT2Tokenizer")
    ),
    "any class": Form("bytes", _config("<s>", tokenizer_class="PreTrainedTokenizerFast")),
    "no post-processor": Form(None, _config("<s>", tokenizer_class="PreTrainedTokenizerFast")),
    "qwen3": Form(
        "bytes",
        _config(None, "<|im_end|>", add_bos_token=False, tokenizer_class="Qwen2Tokenizer"),
    ),
    # A BOS that is added.
    "llama 3": Form("<s> $A", _config("<s>", tokenizer_class="PreTrainedTokenizerFast")),
    "llama 2": Form(
        "<s> $A",
        _config(
            _added("<s>") | {"__type": "AddedToken"},
            add_bos_token=True,
            tokenizer_class="LlamaTokenizer",
        ),
    ),
    "gemma": Form("<s> $A", _config("<s>", tokenizer_class="GemmaTokenizer")),
    "not named": Form("<s> $A", {"eos_token": "</s>"}),
    "not named, only tokenizer.json": Form("<|im_start|> $A", None),
    "named null": Form("<s> $A", _config(None)),
    "another one": Form("<|im_start|> $A", _config("<s>")),
    "glm-4": Form("[gMASK] <s> $A", _config(None)),
    # Version 4 followed the flag; version 5 does not.
    "deepseek-v3": Form(
        "bytes", _config("<s>", add_bos_token=True, tokenizer_class="LlamaTokenizerFast")
    ),
    "a flag that is false": Form(
        "<s> $A", _config("<s>", add_bos_token=False, tokenizer_class="LlamaTokenizerFast")
    ),
    # This class replaces the post-processor.
    "olmoe": Form("$A </s>", _config(None, tokenizer_class="GPTNeoXTokenizer")),
    "gpt-neox": Form("<s> $A", _config("<s>", tokenizer_class="GPTNeoXTokenizerFast")),
    # EOS at the end.
    "bos and eos": Form("<s> $A </s>", _config("<s>"), end=1),
    "qwen3-embedding": Form("$A </s>", _config(None), end=1),
    # A second file.
    "map": Form("<s> $A", {}, _config("<s>")),
    "map, only": Form("bytes", None, _config(_added("<s>"), _added("<|im_end|>"))),
    "map over config": Form("bytes", _config(None, "<|im_end|>"), _config("<s>")),
    "map with fewer": Form("bytes", _config("<s>", "<|im_end|>"), {"bos_token": "<pad>"}),
    "map after version 4.34": Form(
        "bytes", _config(None, "<|im_end|>", added_tokens_decoder=_DECODER), _config("<s>")
    ),
}


def write(directory: pathlib.Path, form: Form) -> None:
    """Writes the files of a form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *alphabet])}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.add_special_tokens(SPECIAL)
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if form.post == "bytes":
        model.post_processor = processors.ByteLevel()
    elif form.post is not None:
        added = [(text, vocabulary[text]) for text in form.post.split() if text != "$A"]
        model.post_processor = processors.TemplateProcessing(single=form.post, special_tokens=added)
    model.save(str(directory / "tokenizer.json"))
    for name, content in (("tokenizer_config", form.config), ("special_tokens_map", form.map)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
