"""Writes published.json: what transformers makes of the tokenizers in published.py.

Not part of the tests. Run it again when a form changes:

    pip install transformers && python -m tests.data.make_published_fixtures
"""

import json
import pathlib
import tempfile

import transformers

from tests.data import published

FILE = pathlib.Path(__file__).with_name("published.json")


def observed(form: published.Form) -> dict:
    """Returns the ids of "Hi" with special tokens, and the names of BOS and EOS."""
    with tempfile.TemporaryDirectory() as directory:
        published.write(pathlib.Path(directory), form)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    names = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    return {"ids": tokenizer.encode("Hi")} | names


def main() -> None:
    content = {"transformers": transformers.__version__}
    content |= {name: observed(form) for name, form in published.FORMS.items()}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
