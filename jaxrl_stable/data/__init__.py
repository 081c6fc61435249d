"""Problems, tokenizers, and grain pipelines that turn the two into batches of numpy arrays."""

from jaxrl_stable.data.arithmetic import ArithmeticSource
from jaxrl_stable.data.packing import packed_iterator
from jaxrl_stable.data.prompts import check_prompts, encode_prompts, prompt_ids, prompt_iterator
from jaxrl_stable.data.sources import (
    JsonlSource,
    Problem,
    ReasoningGymSource,
    Source,
    Subset,
    subset,
)
from jaxrl_stable.data.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

__all__ = [
    "ArithmeticSource",
    "HFTokenizer",
    "JsonlSource",
    "Problem",
    "ReasoningGymSource",
    "SentencePieceTokenizer",
    "Source",
    "Subset",
    "Tokenizer",
    "check_prompts",
    "encode_prompts",
    "load_tokenizer",
    "packed_iterator",
    "prompt_ids",
    "prompt_iterator",
    "subset",
    "train_sentencepiece",
]
