"""Turns a problem into the text of its prompt, by a plain template or a chat template."""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_stable.data.records import Message, Problem
from jaxrl_stable.data.sandbox import compile_template, render_template
from jaxrl_stable.data.tokenizer import special_tokens
from jaxrl_stable.files import read_json

PLACE = "{prompt}"

_GIVEN = ("messages", "add_generation_prompt")


def fill(text: str, prompt: str) -> str:
    """Replaces `{prompt}` in `text` with `prompt`.

    Raises:
      ValueError: unless `text` contains `{prompt}` exactly once.
    """
    if text.count(PLACE) != 1:
        raise ValueError(f"template {text!r} must contain {PLACE} exactly once; add it")
    # Not str.format: prompts and templates may contain braces of their own.
    return text.replace(PLACE, prompt)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Renders a problem as a conversation that ends where the assistant's turn begins.

    The text equals `apply_chat_template(messages, add_generation_prompt=True, **variables)` in
    transformers. It includes the BOS that the template writes, if any.

    Attributes:
      source: Jinja source of the template.
      tokens: texts of special tokens that the template may use, such as `bos_token`.
      words: text of the user's message, with "{prompt}" in place of the problem.
      system: system message for problems without their own; empty to add none.
      variables: further variables of the template.

    Raises:
      ValueError: if the template is not valid Jinja, `words` does not contain "{prompt}", or
        `variables` has a reserved name.
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
                raise ValueError(f"chat variable {name!r} is derived from the problem; remove it")
        compile_template(self.source)

    def __repr__(self) -> str:
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        return f"ChatTemplate(crc32={zlib.crc32(content.encode()):08x})"

    def messages(self, problem: Problem) -> list[Message]:
        """Returns the problem's conversation, or one user message if it has no conversation."""
        last = Message(role="user", content=fill(self.words, problem["prompt"]))
        messages = [*problem.get("messages", [last])[:-1], last]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, Message(role="system", content=self.system))
        return messages

    def render(self, problem: Problem) -> str:
        """Returns the text of a prompt.

        Raises:
          ValueError: if the template rejects the conversation or fails.
        """
        return self.render_messages(self.messages(problem))

    def render_messages(self, messages: Sequence[Message], generate: bool = True) -> str:
        """Returns the text of a conversation.

        Args:
          messages: its turns, the system message included.
          generate: whether the text ends with the start of an assistant's turn.

        Raises:
          ValueError: if the template rejects the conversation or fails.
        """
        told = {
            "tools": None,
            "documents": None,
            **self.tokens,
            **self.variables,
            "messages": list(messages),
            "add_generation_prompt": generate,
        }
        return render_template(self.source, told)


Template = str | ChatTemplate  # a string contains "{prompt}"


def load_chat_template(
    path: str | os.PathLike[str],
    *,
    words: str = PLACE,
    system: str = "",
    variables: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """Loads the chat template of a Hugging Face tokenizer.

    The template is `chat_template.jinja` if that exists, else `chat_template` in
    `tokenizer_config.json`, which may also be a list of named templates with one "default".

    Args:
      path: directory of the tokenizer, or its `tokenizer.json`.
      words: see `ChatTemplate`.
      system: see `ChatTemplate`.
      variables: see `ChatTemplate`.

    Raises:
      ValueError: if no chat template exists or it is invalid. The message names the file.
    """
    file = pathlib.Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if file.suffix != ".json" or not file.exists():
        raise ValueError(
            f"{path}: not a Hugging Face tokenizer, so it has no chat template; set "
            "Data.tokenizer to a chat model's, or turn off Data.chat"
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
            "in tokenizer_config.json; add one, or turn off Data.chat"
        )
    try:
        compile_template(source)
    except ValueError as error:
        raise ValueError(f"{jinja if jinja.exists() else config_file}: {error}") from None
    tokens = {
        field: text
        for field, text in special_tokens(file).items()
        if text is not None and (field in config or field in source)
    }
    return ChatTemplate(source, tokens, words, system, variables or {})


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
