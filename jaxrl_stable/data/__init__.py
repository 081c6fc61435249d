"""Problems, tokenizers, and the grain pipelines that turn them into batches of NumPy arrays."""

from jaxrl_stable.data.arithmetic import ArithmeticSource
from jaxrl_stable.data.demonstrations import packed_iterator
from jaxrl_stable.data.prompts import check_prompts, encode_prompts, prompt_ids, prompt_iterator
from jaxrl_stable.data.sources import (
    JsonlSource,
    Message,
    Problem,
    ReasoningGymSource,
    Source,
    Subset,
    subset,
)
from jaxrl_stable.data.templates import ChatTemplate, Template, load_chat_template
from jaxrl_stable.data.tiktoken import convert_tiktoken
from jaxrl_stable.data.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

__all__ = [
    "ArithmeticSource",
    "ChatTemplate",
    "HFTokenizer",
    "JsonlSource",
    "Message",
    "Problem",
    "ReasoningGymSource",
    "SentencePieceTokenizer",
    "Source",
    "Subset",
    "Template",
    "Tokenizer",
    "check_prompts",
    "convert_tiktoken",
    "encode_prompts",
    "load_chat_template",
    "load_tokenizer",
    "packed_iterator",
    "prompt_ids",
    "prompt_iterator",
    "subset",
    "train_sentencepiece",
]
