"""How a response ends: at EOS, or where a chat template ends an assistant's turn.

The two may differ. Base models often have the EOS `<|endoftext|>` and a template that ends turns
with `<|im_end|>`: a policy that was trained on the one and stopped at the other only would learn a
format that no chat program reads, or never stop.
"""

from typing import NamedTuple

from jaxrl_stable.data.records import Message, Problem
from jaxrl_stable.data.templates import ChatTemplate, Template
from jaxrl_stable.data.tokenizer import Tokenizer

# Stands for an assistant's answer; no template has it, and trimming leaves it alone.
_ANSWER = "AnswerOfTheAssistant"


class Ending(NamedTuple):
    """How responses end.

    Attributes:
      token: id that ends a response in supervised training.
      stop_ids: ids that end a sampled response.
      note: what a user should know, in one line; "" if there is nothing to say.
    """

    token: int
    stop_ids: tuple[int, ...]
    note: str = ""


def ending(tokenizer: Tokenizer, template: Template) -> Ending:
    """Returns how responses end under a template.

    A chat template is asked: it renders a conversation with an answer, and the token after the
    answer (and white space) ends the turn, if it is a special token. Supervised training then ends
    answers with it, and sampling stops at it too. Otherwise, and with a plain template, both use
    the EOS tokens.
    """
    usual = Ending(tokenizer.eos_id, tuple(tokenizer.eos_ids))
    if not isinstance(template, ChatTemplate):
        return usual
    eos = tokenizer.decode([tokenizer.eos_id], special_tokens=True)
    advice = (
        f"responses end with the EOS token {eos!r} instead; if that is wrong, edit the template so "
        "that it writes one special token after an answer"
    )
    try:
        text = _after_answer(template)
    except ValueError as error:
        return usual._replace(note=f"no answer could be rendered ({error}); {advice}")
    if text is None:
        return usual._replace(note=f"the chat template changes an assistant's answer; {advice}")
    ids = tokenizer.encode(text.strip())
    first = tokenizer.decode(ids[:1], special_tokens=True)
    if not ids or tokenizer.control_token(first) is None or tokenizer.encode(first) != ids[:1]:
        written = (
            f"{text[:40]!r}, which does not begin with a special token," if text else "nothing"
        )
        return usual._replace(
            note=f"the chat template writes {written} after an assistant's answer; {advice}"
        )
    return Ending(ids[0], tuple(dict.fromkeys([*usual.stop_ids, ids[0]])))


def _after_answer(template: ChatTemplate) -> str | None:
    """Returns what a template writes after an answer, or None if the answer cannot be found."""
    question = template.messages(Problem(prompt="1+1", answer=""))
    answered = [*question, Message(role="assistant", content=_ANSWER)]
    _, found, after = template.render_messages(answered, generate=False).rpartition(_ANSWER)
    return after if found else None
