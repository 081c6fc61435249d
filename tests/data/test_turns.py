"""How a response ends under the chat templates of several families."""

import json

import numpy as np
import pytest

from jaxrl_stable import data
from jaxrl_stable.rewards import load_reward
from jaxrl_stable.run.task import Task
from tests.data.test_chat import RENDERED, save

CHATML = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def loaded(directory, model, generation=None, eos=None, jinja=None):
    """Returns a tokenizer and its chat template, with other stop tokens or another template."""
    config = RENDERED["configs"][model] | ({"eos_token": eos} if eos else {})
    files = {"config": json.dumps(config)} | ({"jinja": jinja} if jinja is not None else {})
    save(directory, model, **files)
    if generation is not None:
        ids = [id_of(text) for text in generation]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return data.load_tokenizer(directory), data.load_chat_template(directory)


def id_of(text):
    return next(t["id"] for t in RENDERED["tokenizer"]["added_tokens"] if t["content"] == text)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model", "token"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("mixtral", "</s>"),
        ("deepseek", "<｜end▁of▁sentence｜>"),
    ],
)
def test_nothing_changes_if_eos_ends_the_turn(tmp_path, model, token):
    tokenizer, template = loaded(tmp_path, model)
    assert data.ending(tokenizer, template) == (id_of(token), (id_of(token),), "")
    assert data.ending(tokenizer, "{prompt}") == (tokenizer.eos_id, tokenizer.eos_ids, "")


@pytest.mark.fast
def test_a_base_model_ends_turns_as_its_template_does(tmp_path):
    """Qwen3-Base: EOS ends documents, and the template has another token."""
    tokenizer, template = loaded(tmp_path, "chatml", eos="<|endoftext|>")
    document, turn = id_of("<|endoftext|>"), id_of("<|im_end|>")
    assert tokenizer.eos_ids == (document,)
    assert data.ending(tokenizer, template) == (turn, (document, turn), "")
    source = [{"prompt": "17+25", "answer": "42"}]
    settings = dict(batch_size=1, length=99, seed=0)
    reward = load_reward("exact")
    for chosen, last in ((template, turn), ("{prompt}", document)):
        batch = next(data.packed_iterator(source, tokenizer, template=chosen, **settings))
        example = batch["loss_mask"][0] & (batch["segment_ids"][0] == 1)
        assert batch["tokens"][0, example].tolist() == [*tokenizer.encode("42"), last]
        task = Task(source, source, tokenizer, reward, template=chosen, special_tokens=True)
        assert task.sampling(5, 1.0).stop_ids == ((document, turn) if last == turn else (document,))
        response = np.array([[*tokenizer.encode("42"), last]])
        assert task.decode(response, response > 0) == ["42"]
    early = [{"prompt": "1", "answer": "4<|im_end|>2"}]
    with pytest.raises(ValueError, match="the answer contains the text of a stop token"):
        data.check_demonstrations(early, tokenizer, 99, template)
    data.check_demonstrations(early, tokenizer, 99)


@pytest.mark.fast
def test_the_template_chooses_among_several_stop_tokens(tmp_path):
    """Moonlight, Phi: sampling already stops at both, in this order."""
    both = ["<|endoftext|>", "<|im_end|>"]
    tokenizer, template = loaded(tmp_path, "chatml", generation=both, eos=both[0])
    ids = tuple(map(id_of, both))
    assert data.ending(tokenizer, template) == (ids[1], ids, "")


@pytest.mark.fast
def test_system_message_and_variables_reach_the_template(tmp_path):
    tokenizer, _ = loaded(
        tmp_path,
        "chatml",
        jinja="{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[-1].content }}{{ '<|eot_id|>' if short else '<|im_end|>' }}",
    )
    template = data.load_chat_template(tmp_path, system="S", variables={"short": True})
    assert data.ending(tokenizer, template).token == id_of("<|eot_id|>")
    end = data.ending(tokenizer, data.load_chat_template(tmp_path))
    assert end.token == tokenizer.eos_id
    assert end.note.startswith("no answer could be rendered (the chat template fails: no system)")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("after", "token", "note"),
    [
        ("<|im_end|>", "<|im_end|>", ""),
        (" <|im_end|>\n", "<|im_end|>", ""),  # Llama 2 writes a space
        ("", None, "writes nothing after an assistant's answer"),
        ("\n### ", None, r"writes '\n### ', which does not begin with a special token, after"),
        ("</think>", None, "writes '</think>', which does not"),  # a tag, which answers may contain
        ("<|unknown|>", None, "writes '<|unknown|>', which does"),  # several tokens
    ],
)
def test_templates_that_end_turns_otherwise_are_reported(tmp_path, after, token, note):
    jinja = CHATML.replace("<|im_end|>\n", after)
    tokenizer, template = loaded(tmp_path, "chatml", eos="</s>", jinja=jinja)
    end = data.ending(tokenizer, template)
    assert end.token == (id_of(token) if token else tokenizer.eos_id)
    assert note in end.note and bool(note) == bool(end.note) and "\n" not in end.note
    if note:
        assert end.stop_ids == tokenizer.eos_ids
        assert "responses end with the EOS token '</s>' instead; if that is wrong" in end.note


def test_a_template_that_changes_answers_is_reported(tmp_path):
    tokenizer, template = loaded(
        tmp_path, "chatml", jinja="{{ messages[-1].content | upper }}<|im_end|>"
    )
    end = data.ending(tokenizer, template)
    assert end.token == tokenizer.eos_id and end.note.startswith("the chat template changes an")
