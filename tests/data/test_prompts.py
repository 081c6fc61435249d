import json

import numpy as np
import pytest

from jaxrl_stable import data
from jaxrl_stable.data import prompts


class Letters:
    """A tokenizer with one id per letter, so that results can be computed by hand."""

    vocab_size, pad_id, bos_id, eos_id, eos_ids = 128, 0, 1, 2, (2,)

    def encode(self, text):
        return list(text.encode("ascii"))

    def decode(self, ids):
        return bytes(i for i in map(int, ids) if i > 2).decode("ascii")

    def control_token(self, text):
        return None


def problems(*prompts):
    return [{"prompt": prompt, "answer": "0"} for prompt in prompts]


@pytest.mark.fast
def test_left_padding_by_hand():
    tokens, mask = data.encode_prompts(problems("ab", "{}"), Letters(), 5, "{prompt}?")
    np.testing.assert_array_equal(tokens, [[0, 1, 97, 98, 63], [0, 1, 123, 125, 63]])
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1, 1]] * 2)
    assert tokens.dtype == np.int32 and mask.dtype == bool

    # Other braces of a template are plain text.
    ids = data.prompt_ids(problems("a")[0], Letters(), r"{}{prompt}")
    assert ids == [1, 123, 125, 97]

    no_bos = Letters()
    no_bos.bos_id = None
    tokens, mask = data.encode_prompts(problems("a"), no_bos, 3)
    np.testing.assert_array_equal(tokens, [[0, 0, 97]])
    np.testing.assert_array_equal(mask, [[0, 0, 1]])


def test_mask_marks_tokens_not_ids():
    # If pad is EOS, a prompt may contain the pad id.
    tokenizer = Letters()
    tokenizer.pad_id = ord("a")
    tokens, mask = data.encode_prompts(problems("aa"), tokenizer, 4)
    np.testing.assert_array_equal(tokens, [[97, 1, 97, 97]])
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1]])


def test_faulty_prompts():
    with pytest.raises(ValueError, match="problem 1 of this batch: the prompt has 4 tokens, more "):
        data.encode_prompts(problems("a", "abc"), Letters(), 3)
    for template in ("no place", "{prompt}{prompt}"):
        with pytest.raises(ValueError, match=r"must contain \{prompt\} exactly once"):
            data.encode_prompts(problems("a"), Letters(), 3, template)
    no_bos = Letters()
    no_bos.bos_id = None
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        data.encode_prompts(problems(""), no_bos, 3)


def test_check_prompts_names_the_first_record_and_counts(source, tokenizer):
    longest = data.check_prompts(source, tokenizer, 200)
    assert data.check_prompts(source, tokenizer, longest) == longest
    lengths = [len(data.prompt_ids(p, tokenizer)) for p in source]
    first = next(i for i, length in enumerate(lengths) if length > longest - 3)
    count = sum(length > longest - 3 for length in lengths)
    with pytest.raises(ValueError, match=f"{longest - 3}; increase the width") as caught:
        data.check_prompts(source, tokenizer, longest - 3)
    assert str(caught.value).startswith(f"{source!r}[{first}]: the prompt has {lengths[first]} ")
    assert f"records affected: {count} of 60; longest: {longest} tokens" in str(caught.value)
    # The pipeline also names the record.
    batches = data.prompt_iterator(source, tokenizer, batch_size=60, width=longest - 3, seed=0)
    with pytest.raises(ValueError, match=r"ArithmeticSource\(.*\)\[\d+\]: the prompt has"):
        next(batches)


def iterate(source, tokenizer, **changes):
    settings = {"batch_size": 8, "width": 80, "seed": 7, **changes}
    return data.prompt_iterator(source, tokenizer, **settings)


@pytest.mark.fast
def test_batches_match_the_source(source, tokenizer):
    batch = next(iterate(source, tokenizer, template="{prompt}\n"))
    assert batch["tokens"].shape == batch["mask"].shape == (8, 80)
    assert batch["index"].dtype == np.int64
    assert batch["problems"] == [source[int(i)] for i in batch["index"]]
    for tokens, mask, problem in zip(
        batch["tokens"], batch["mask"], batch["problems"], strict=True
    ):
        assert tokens[mask][0] == tokenizer.bos_id
        assert tokenizer.decode(tokens[mask]) == problem["prompt"] + "\n"
        assert (np.diff(mask.astype(int)) >= 0).all() and mask[-1]


def test_each_prompt_once_an_epoch_in_a_new_order(source, tokenizer):
    batches = iterate(source, tokenizer)  # 60 prompts in batches of 8, so batches span epochs
    order = np.concatenate([next(batches)["index"] for _ in range(15)])
    epochs = order.reshape(2, 60)
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
        assert (epoch != np.arange(60)).any()
    assert (epochs[0] != epochs[1]).any()
    other = next(iterate(source, tokenizer, seed=8))
    assert (other["index"] != order[:8]).any()


def test_batches_of_one(tokenizer):
    """grain cannot count an endless data set in batches of one."""
    source = problems(*map(str, range(5)))
    options = dict(batch_size=1, width=4, seed=0)
    iterator = data.prompt_iterator(source, tokenizer, **options)
    batches = [next(iterator) for _ in range(7)]
    position, expected = iterator.get_state(), next(iterator)
    assert sorted(int(batch["index"][0]) for batch in batches[:5]) == list(range(5))
    for batch in batches:
        assert batch["tokens"].shape == (1, 4) and batch["index"].shape == (1,)
        assert batch["problems"] == [source[int(batch["index"][0])]]
    resumed = data.prompt_iterator(source, tokenizer, **options)
    resumed.set_state(position)
    assert next(resumed)["index"] == expected["index"]


def test_a_process_reads_the_prompts_it_holds_of_the_same_batches(source, tokenizer):
    held = np.array([0, 1, 1, 0, 0, 0, 0, 1], bool)
    read = []

    class Noting:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            read.append(index)
            return source[index]

    whole, part = iterate(source, tokenizer), iterate(Noting(), tokenizer, held=held)
    for _ in range(10):
        batch, own = next(whole), next(part)
        np.testing.assert_array_equal(own["index"], batch["index"])
        assert not own["mask"][~held].any() and (own["tokens"][~held] == tokenizer.pad_id).all()
        for key in ("tokens", "mask"):
            np.testing.assert_array_equal(own[key][held], batch[key][held])
        for mine, ours, theirs in zip(held, own["problems"], batch["problems"], strict=True):
            assert ours == (theirs if mine else None)
        assert set(batch["index"][held]) <= set(read)
    assert len(read) <= 3 * 13  # grain reads a few batches ahead


@pytest.mark.fast
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 15])
def test_resumes_exactly(source, tokenizer, steps):
    batches = iterate(source, tokenizer)
    for _ in range(steps):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    resumed = iterate(source, tokenizer)
    resumed.set_state(state)
    for batch in expected:
        again = next(resumed)
        assert again["problems"] == batch["problems"]
        np.testing.assert_array_equal(again["index"], batch["index"])
        np.testing.assert_array_equal(again["tokens"], batch["tokens"])
    # The index includes prompts that other processes hold.
    part = iterate(source, tokenizer, held=np.arange(8) < 3)
    part.set_state(state)
    np.testing.assert_array_equal(next(part)["index"], expected[0]["index"])


def test_faulty_sizes(source, tokenizer):
    with pytest.raises(ValueError, match="batch_size is 0; use at least 1"):
        iterate(source, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="is empty"):
        iterate([], tokenizer)
    one = [{"prompt": "a", "answer": "b"}]
    np.testing.assert_array_equal(next(iterate(one, tokenizer))["index"], np.zeros(8))


@pytest.mark.fast
def test_all_prompts_are_checked_in_chunks(source, tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "CHECKED_TOGETHER", 7)
    longest = max(len(data.prompt_ids(problem, tokenizer)) for problem in source)
    assert data.check_prompts(source, tokenizer, longest) == longest
    with pytest.raises(ValueError, match=r"\[0\]: .*affected: 60 of 60; longest"):
        data.check_prompts(source, tokenizer, 1)
    problems = [source[i] for i in range(20)]
    problems[9] = {"prompt": "9 \ud83d", "answer": "1"}
    problems[17] = {"prompt": "9", "answer": "\udc00"}
    message = r"\]\[9\]: field 'prompt' has half of a surrogate pair, .*affected: 2 of 20"
    with pytest.raises(ValueError, match=message):
        data.check_prompts(problems, tokenizer, 99)


@pytest.mark.fast
def test_prompts_in_both_sets_are_counted(source):
    def asked(*prompts):
        return [{"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]

    heldout = asked("1+1?", "2+2?", "3+3?", "1+1?")
    line = "{} of {} held-out prompts are in the training set"
    assert data.overlap(asked("1+1?", "5"), heldout, 4) == line.format(2, 4)
    assert data.overlap(asked("5", " 3+3? \n"), heldout, 4) == line.format(1, 4)  # white space
    assert data.overlap(asked("3+3?"), heldout, 2) == ""  # only those that are evaluated
    assert data.overlap(asked("1+1"), heldout, 4) == ""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "1"}]
    chat = {
        "prompt": "1+1?",
        "answer": "",
        "messages": [*turns, {"role": "user", "content": "1+1?"}],
    }
    assert data.overlap([chat], heldout, 4) == ""  # another conversation
    assert data.overlap([chat], [chat], 1) == line.format(1, 1)
