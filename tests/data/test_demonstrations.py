import copy
import itertools
import json
from functools import partial

import numpy as np
import pytest

from jaxrl_stable import data
from jaxrl_stable.data import prompts

TEMPLATE = "{prompt}\n"


def iterate(source, tokenizer, **changes):
    settings = {"batch_size": 4, "length": 160, "seed": 3, "template": TEMPLATE, **changes}
    return data.packed_iterator(source, tokenizer, **settings)


def segments(batch):
    """The examples of a batch: (row, number, columns)."""
    for row, ids in enumerate(batch["segment_ids"]):
        for number in range(1, ids.max() + 1):
            yield row, number, np.flatnonzero(ids == number)


@pytest.mark.fast
def test_every_segment_is_one_example(source, tokenizer):
    examples = {}
    for index, problem in enumerate(source):
        # The prompt has the tokens of a rollout; the answer is tokenised separately.
        tokens, mask = data.encode_prompts([problem], tokenizer, 100, TEMPLATE)
        answer = tokenizer.encode(problem["answer"])
        prompt = tokens[mask].tolist()
        examples[(*prompt, *answer, tokenizer.eos_id)] = (index, len(prompt))

    seen = []
    for batch in itertools.islice(iterate(source, tokenizer), 5):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "tokens": ((4, 160), np.int32),
            "segment_ids": ((4, 160), np.int32),
            "positions": ((4, 160), np.int32),
            "loss_mask": ((4, 160), bool),
        }
        for row, _, columns in segments(batch):
            index, prompt_length = examples[tuple(batch["tokens"][row, columns].tolist())]
            seen.append(index)
            np.testing.assert_array_equal(columns, np.arange(columns[0], columns[-1] + 1))
            np.testing.assert_array_equal(batch["positions"][row, columns], range(len(columns)))
            np.testing.assert_array_equal(
                batch["loss_mask"][row, columns], np.arange(len(columns)) >= prompt_length
            )
        padding = batch["segment_ids"] == 0
        assert (batch["tokens"][padding] == tokenizer.pad_id).all()
        assert not batch["loss_mask"][padding].any()
        assert not batch["positions"][padding].any()
        assert batch["segment_ids"].max() >= 2, "nothing was packed"
    # Nothing is lost or duplicated: the packed examples are a prefix of the epochs.
    assert len(seen) >= 40
    assert len(set(seen[:60])) == min(len(seen), 60)


def test_loss_mask_by_hand(tokenizer):
    problem = {"prompt": "17", "answer": "42"}
    batch = next(iterate([problem], tokenizer, batch_size=1, length=7))
    digit = lambda d: tokenizer.encode(d)[0]  # noqa: E731
    expected = [1, digit("1"), digit("7"), digit("\n"), digit("4"), digit("2"), 2]
    np.testing.assert_array_equal(batch["tokens"], [expected])
    np.testing.assert_array_equal(batch["loss_mask"], [[0, 0, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1] * 7])
    np.testing.assert_array_equal(batch["positions"], [range(7)])


@pytest.mark.fast
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_resumes_exactly(source, tokenizer, steps):
    batches = iterate(source, tokenizer)
    for _ in range(steps):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = iterate(source, tokenizer)
    resumed.set_state(state)
    for _ in range(4):
        batch, again = next(batches), next(resumed)
        for key, value in batch.items():
            np.testing.assert_array_equal(again[key], value)


def test_deterministic_and_seeded(source, tokenizer):
    first, again = next(iterate(source, tokenizer)), next(iterate(source, tokenizer))
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    other = next(iterate(source, tokenizer, seed=4))
    assert (first["tokens"] != other["tokens"]).any()


@pytest.mark.fast
def test_all_demonstrations_are_checked_before_a_run(source, tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "CHECKED_TOGETHER", 7)  # several chunks, the last not full
    check = partial(data.check_demonstrations, source, tokenizer, template=TEMPLATE)
    texts = [(problem["prompt"] + "\n", problem["answer"]) for problem in source]
    totals = [2 + sum(len(tokenizer.encode(text)) for text in pair) for pair in texts]  # BOS, EOS
    longest = max(totals)
    assert check(longest) == check(999, context=longest) == longest
    first = f"[{totals.index(longest)}]: the example has {longest} tokens, more than the "
    end = f"(records affected: {totals.count(longest)} of 60; longest: {longest} tokens)"
    with pytest.raises(ValueError, match=r"\(Supervised\.length\) or remove") as caught:
        check(longest - 1)
    assert f"{first}row length of {longest - 1}; lengthen the rows " in str(caught.value)
    assert str(caught.value).startswith("ArithmeticSource(") and str(caught.value).endswith(end)
    with pytest.raises(ValueError, match=r"\(ModelConfig\.max_positions\); remove") as caught:
        check(999, context=longest - 1)
    assert f"{first}{longest - 1} positions that the model was" in str(caught.value)


@pytest.mark.fast
def test_faulty_demonstrations_name_the_line(tokenizer, tmp_path):
    stops = copy.copy(tokenizer)  # with the digit 7 as a stop token
    stops.eos_ids = (tokenizer.eos_id, *tokenizer.encode("7"))
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": "1", "answer": "2"}, {"prompt": "3", "answer": "47"}]
    path.write_text("\n" + "\n".join(map(json.dumps, lines)))
    source = data.JsonlSource(path)
    assert data.check_demonstrations(source, tokenizer, 99) == 5
    message = (
        r"a\.jsonl, line 3: the answer contains the text of a stop .*affected: 1 of 2; longest"
    )
    with pytest.raises(ValueError, match=message):
        data.check_demonstrations(source, stops, 99)
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 3: the answer contains the text of a stop"
    ):
        next(iterate(source, stops, batch_size=2))
    # A source of another kind may have what a file cannot.
    cut = [{"prompt": "1", "answer": "2"}, {"prompt": "1", "answer": "\ud83d"}]
    with pytest.raises(ValueError, match=r"\[1\]: field 'answer' has half of a surrogate pair"):
        data.check_demonstrations(cut, tokenizer, 99)


def test_too_long_examples_are_named(source, tokenizer):
    with pytest.raises(
        ValueError,
        match=r"ArithmeticSource\(.*\)\[\d+\]: the example has \d+ tokens, more than the row "
        "length of 20; lengthen",
    ):
        next(iterate(source, tokenizer, length=20))
