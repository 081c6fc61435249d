"""Problems, tokenizers, and the grain pipelines that turn them into batches of NumPy arrays."""

from jaxrl_stable.data.arithmetic import ArithmeticSource
from jaxrl_stable.data.demonstrations import check_demonstrations, packed_iterator
from jaxrl_stable.data.prompts import (
    check_prompts,
    encode_prompts,
    overlap,
    prompt_ids,
    prompt_iterator,
)
from jaxrl_stable.data.records import Message, Problem
from jaxrl_stable.data.sources import (
    Concatenated,
    JsonlSource,
    ReasoningGymSource,
    Source,
    Subset,
    concatenate,
    open_source,
    subset,
)
from jaxrl_stable.data.templates import ChatTemplate, Template, load_chat_template
from jaxrl_stable.data.tiktoken import convert_tiktoken
from jaxrl_stable.data.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    unknown_tokens,
)
from jaxrl_stable.data.turns import Ending, ending
from jaxrl_stable.data.vocabulary import train_sentencepiece

__all__ = [
    "ArithmeticSource",
    "ChatTemplate",
    "Concatenated",
    "Ending",
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
    "check_demonstrations",
    "check_prompts",
    "concatenate",
    "convert_tiktoken",
    "encode_prompts",
    "ending",
    "load_chat_template",
    "load_tokenizer",
    "open_source",
    "overlap",
    "packed_iterator",
    "prompt_ids",
    "prompt_iterator",
    "subset",
    "train_sentencepiece",
    "unknown_tokens",
]
