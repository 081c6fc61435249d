"""Writes chat/rendered.json: the templates in chat/ as rendered by transformers.

Not part of the tests. Run it again when a template changes:

    pip install transformers jinja2 && python -m tests.data.make_chat_fixtures
"""

import json
import pathlib
import tempfile

import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

CHAT = pathlib.Path(__file__).with_name("chat")
# Template, its special tokens, and its other variables.
MODELS = {
    "chatml": (None, "<|im_end|>", [{}, {"enable_thinking": False}, {"tools": [{"name": "café"}]}]),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", [{"date_string": "26 Jul 2024"}]),
    "mixtral": ("<s>", "</s>", [{}]),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [{}]),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>"]
SPECIAL += ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
ORDINARY = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"]

QUESTION = {"role": "user", "content": " What is 17+25?\nShow {prompt} <b>steps</b> 数 🧮\n"}
EARLIER = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>\nshort\n</think>\n\nHello. "},
]
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CONVERSATIONS = [[QUESTION], [SYSTEM, QUESTION], [SYSTEM, *EARLIER, QUESTION]]


def toy_tokenizer() -> tokenizers.Tokenizer:
    """A few merges, and the special tokens of all models."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["user assistant system the what is INST Hello 17 25"] * 9, trainer)
    model.add_special_tokens(SPECIAL)
    model.add_tokens([AddedToken(text, normalized=False) for text in ORDINARY])
    # Adds a BOS at the start, which a rendered chat must not get.
    bos = ("<s>", model.token_to_id("<s>"))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return model


def main() -> None:
    model, cases, configs = toy_tokenizer(), [], {}
    for name, (bos, eos, told) in MODELS.items():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=model,
            bos_token=bos,
            eos_token=eos,
            chat_template=(CHAT / f"{name}.jinja").read_text(encoding="utf-8"),
        )
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            file = pathlib.Path(directory, "tokenizer_config.json")
            configs[name] = json.loads(file.read_text(encoding="utf-8"))
        for variables in told:
            for messages in CONVERSATIONS:
                settings = dict(add_generation_prompt=True, **variables)
                text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
                ids = tokenizer.apply_chat_template(messages, return_dict=False, **settings)
                case = {"model": name, "variables": variables, "messages": messages}
                cases.append(case | {"text": text, "ids": ids})
    content = {
        "transformers": transformers.__version__,
        "tokenizer": json.loads(model.to_str()),
        "configs": configs,
        "cases": cases,
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (CHAT / "rendered.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
