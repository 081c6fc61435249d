"""From a problem to the text of its prompt: words around it, or a model's own chat template."""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

from jaxrl_stable.data.sandbox import compile_template, render_template
from jaxrl_stable.data.sources import Message, Problem
from jaxrl_stable.files import read_json

PLACE = "{prompt}"

_GIVEN = ("messages", "add_generation_prompt")


def fill(text: str, prompt: str) -> str:
    """Puts a prompt in its place in `text`; ValueError if that is not there exactly once."""
    if text.count(PLACE) != 1:
        raise ValueError(f"template {text!r} must contain {PLACE} exactly once; put it in")
    # Not str.format: prompts and templates may contain braces of their own.
    return text.replace(PLACE, prompt)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Makes a conversation of a problem, up to where the assistant is to speak.

    The text is that of `apply_chat_template(messages, add_generation_prompt=True, **variables)` in
    transformers. It has the BOS that the template writes, if any.

    Attributes:
      source: the template, in Jinja.
      tokens: texts of the special tokens that it may name, such as `bos_token`.
      words: text around the problem in the user's message; "{prompt}" stands for it.
      system: system message of problems that have none of their own; empty for none.
      variables: what the template is told besides.

    Raises:
      ValueError: the template is not valid Jinja, `words` has no place for the problem, or
        `variables` has a name that is taken.
    """

    source: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    words: str = PLACE
    system: str = ""
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        fill(self.words, "")
        for name in _GIVEN:
            if name in self.variables:
                raise ValueError(f"chat variable {name!r} is made from the problem; leave it out")
        compile_template(self.source)

    def __repr__(self) -> str:
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        return f"ChatTemplate(crc32={zlib.crc32(content.encode()):08x})"

    def messages(self, problem: Problem) -> list[Message]:
        """The conversation: the problem's own, or one message of the user."""
        last = Message(role="user", content=fill(self.words, problem["prompt"]))
        messages = [*problem.get("messages", [last])[:-1], last]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, Message(role="system", content=self.system))
        return messages

    def render(self, problem: Problem) -> str:
        """Returns the text of a prompt; ValueError if the template refuses or fails."""
        told = {
            "tools": None,
            "documents": None,
            **self.tokens,
            **self.variables,
            "messages": self.messages(problem),
            "add_generation_prompt": True,
        }
        return render_template(self.source, told)


Template = str | ChatTemplate  # a text has "{prompt}" in it


def load_chat_template(
    path: str | os.PathLike[str],
    *,
    words: str = PLACE,
    system: str = "",
    variables: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """Finds the chat template of a Hugging Face tokenizer: a directory, or its `tokenizer.json`.

    It is `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`: a text, or a
    list of named ones, of which "default" is taken.

    Raises:
      ValueError: there is none, or something in it is wrong; names the place.
    """
    file = pathlib.Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if file.suffix != ".json" or not file.exists():
        raise ValueError(
            f"{path}: no Hugging Face tokenizer is here, so there is no chat template; name that "
            "of a chat model in Data.tokenizer, or leave Data.chat off"
        )
    config_file, jinja = map(file.with_name, ("tokenizer_config.json", "chat_template.jinja"))
    config = read_json(config_file)
    if jinja.exists():
        source = jinja.read_text(encoding="utf-8")
    else:
        source = _default(config.get("chat_template"), config_file)
    if not isinstance(source, str):
        raise ValueError(
            f"{file.parent}: has no chat template, neither chat_template.jinja nor chat_template "
            "in tokenizer_config.json; add one, or leave Data.chat off"
        )
    try:
        compile_template(source)
    except ValueError as error:
        raise ValueError(f"{jinja if jinja.exists() else config_file}: {error}") from None
    return ChatTemplate(source, _token_texts(config), words, system, variables or {})


def _default(found: Any, file: pathlib.Path) -> Any:
    if not isinstance(found, list):
        return found
    named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    if "default" not in named:
        raise ValueError(
            f"{file}: none of its chat templates ({', '.join(map(repr, named))}) is called "
            "'default'; rename the one to use"
        )
    return named["default"]


def _token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like: texts, or objects with a `content`."""
    texts = {}
    for field, value in config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if field.endswith("_token") and isinstance(value, str):
            texts[field] = value
    return texts
