import json
import os

import numpy as np
import pytest
import tokenizers

from jaxrl_stable import data

TEXTS = ["Ann has 17 pens.\nHow many?  two spaces ", " 17+25=42 #### 42", "tab\there\n\n", "é"]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_end|>"]


@pytest.mark.fast
def test_sentencepiece_round_trip_and_ids(tmp_path):
    tokenizer = data.train_sentencepiece(TEXTS * 3, tmp_path / "a.model", 64)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.vocab_size == 64
    # Special ids decode to nothing; NumPy integers are accepted.
    ids = np.array([1, *tokenizer.encode("42"), 2, 0], np.int32)
    assert tokenizer.decode(ids) == "42"
    # One token per digit and per line break, in any position.
    assert len(tokenizer.encode("1742")) == 4
    assert tokenizer.encode("\n\n") == 2 * tokenizer.encode("\n")


def test_sentencepiece_is_deterministic_and_written_whole(tmp_path, monkeypatch):
    data.train_sentencepiece(TEXTS * 3, tmp_path / "a.model", 64)
    data.train_sentencepiece(reversed(TEXTS * 3), tmp_path / "b.model", 64)
    content = (tmp_path / "a.model").read_bytes()
    assert content == (tmp_path / "b.model").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        data.train_sentencepiece(["another text"] * 9, tmp_path / "a.model", 16)
    assert (tmp_path / "a.model").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_sentencepiece_keeps_long_texts(tmp_path):
    # By default SentencePiece skips texts above 4,192 bytes.
    tokenizer = data.train_sentencepiece(["z" + "ab " * 3_000, "ab"], tmp_path / "a.model", 12)
    assert tokenizer.decode(tokenizer.encode("z")) == "z"


def test_byte_fallback(tmp_path):
    tokenizer = data.train_sentencepiece(TEXTS, tmp_path / "a.model", 300, byte_fallback=True)
    assert tokenizer.decode(tokenizer.encode("日本 Ω")) == "日本 Ω"


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (TEXTS, 5_000, r"vocab_size 5000 does not suit these texts: .*set it to a value <= \d+"),
        (TEXTS, 8, r"vocab_size 8 does not suit these texts: .*smaller than required"),
        ([], 50, "no text to train on"),
        ([""], 50, "no text to train on"),
        (["ab \u2581 cd", "ab"], 10, "does not survive encoding"),
        (["ab\r\n"], 7, r"'ab.r.n' does not survive encoding; remove carriage returns, other"),
    ],
)
def test_training_faults(tmp_path, texts, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.train_sentencepiece(texts, tmp_path / "a.model", size)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hf_directory(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    # Adds <s>, truncates and pads; none of this may take effect.
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    model.enable_truncation(3)
    model.enable_padding(length=20)
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory, name, content):
    (directory / name).write_text(json.dumps(content))


@pytest.mark.fast
def test_hf_round_trip_and_usual_names(hf_directory):
    model = json.loads((hf_directory / "tokenizer.json").read_text())["model"]
    for path in (hf_directory, hf_directory / "tokenizer.json"):
        tokenizer = data.load_tokenizer(path)
        assert isinstance(tokenizer, data.HFTokenizer)
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
        assert tokenizer.eos_ids == (2,)
        assert tokenizer.vocab_size == len(model["vocab"])
        assert 1 not in tokenizer.encode("Ann")
        assert tokenizer.encode("<|im_end|>") == [3]
        ids = np.array([1, *tokenizer.encode("Ann"), 2, 3, 0])
        assert tokenizer.decode(ids) == "Ann"
        assert tokenizer.decode(ids[:4], special_tokens=True).startswith("<s>")


@pytest.mark.fast
def test_ids_without_a_token_are_visible_and_counted(hf_directory, tmp_path):
    """A reward must not see a clean answer around them."""
    content = json.loads((hf_directory / "tokenizer.json").read_text())
    gap = content["model"]["vocab"].pop("Ġhas", None) or content["model"]["vocab"].pop("17")
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if "".join(pair) in content["model"]["vocab"]
    ]
    write(hf_directory, "tokenizer.json", content)
    hf = data.load_tokenizer(hf_directory)
    assert hf.gaps == {gap}
    spm = data.train_sentencepiece(TEXTS * 3, tmp_path / "a.model", 64)
    for tokenizer, extra in ((hf, [gap]), (spm, [])):
        four, two = tokenizer.encode("4"), tokenizer.encode("2")
        for unknown in (tokenizer.vocab_size, 10**9, -1, *extra):
            ids = np.array([unknown, *four, unknown, unknown, *two, tokenizer.eos_id])
            assert tokenizer.decode(ids) == "\ufffd4\ufffd\ufffd2"
            expected = ids == unknown
            np.testing.assert_array_equal(data.unknown_tokens(tokenizer, ids), expected)
        assert tokenizer.decode([]) == ""


@pytest.mark.fast
def test_texts_are_encoded_together_as_one_by_one(hf_directory, tmp_path):
    texts = [*TEXTS, "<|im_end|> a <s>", "", *TEXTS]
    hf = data.load_tokenizer(hf_directory)
    spm = data.train_sentencepiece(TEXTS * 3, tmp_path / "a.model", 64)
    for tokenizer in (hf, spm):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert hf.control_tokens(texts) == [hf.control_token(text) for text in texts]
    assert hf.control_tokens(texts)[4] == "<|im_end|>"


def test_hf_special_tokens_from_the_files_beside_it(hf_directory):
    # As in Qwen: prompts start with none, although the generation settings name a BOS.
    content = json.loads((hf_directory / "tokenizer.json").read_text())
    write(hf_directory, "tokenizer.json", content | {"post_processor": None})
    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>"}
    write(hf_directory, "tokenizer_config.json", config)
    write(hf_directory, "generation_config.json", {"eos_token_id": [3, 2], "bos_token_id": 1})
    tokenizer = data.HFTokenizer(hf_directory)
    assert tokenizer.bos_id is None
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.pad_id) == (3, (3, 2), 0)

    write(hf_directory, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    write(hf_directory, "generation_config.json", {"eos_token_id": 3})
    tokenizer = data.HFTokenizer(hf_directory)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((2, 3), 2)  # no pad token: EOS


@pytest.mark.parametrize(
    ("named", "eos_ids"),
    [
        ({"eos_token_id": 3}, (2, 3)),
        ({"eos_token_id": [3, 2, 3, 0]}, (2, 3, 0)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": []}, (2,)),
        ({}, (2,)),
        (None, (2,)),
    ],
)
def test_hf_stop_tokens(hf_directory, named, eos_ids):
    write(hf_directory, "tokenizer_config.json", {"eos_token": "</s>"})
    if named is not None:
        write(hf_directory, "generation_config.json", named)
    tokenizer = data.HFTokenizer(hf_directory)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (2, eos_ids)
    assert tokenizer.pad_id == 2


def test_hf_without_a_named_eos(hf_directory):
    """The first id that ends generation is the one to train on."""
    write(hf_directory, "tokenizer_config.json", {"bos_token": "<s>"})
    write(hf_directory, "generation_config.json", {"eos_token_id": [3, 2], "pad_token_id": 0})
    tokenizer = data.HFTokenizer(hf_directory)
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.pad_id) == (3, (3, 2), 0)


@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("wrong", [300, -1, 10**12, True, 2.0, "</s>", [2, 300], [[2]]])
def test_hf_ids_outside_the_vocabulary(hf_directory, field, wrong):
    write(hf_directory, "tokenizer_config.json", {"eos_token": "</s>"})
    write(hf_directory, "generation_config.json", {field: wrong})
    with pytest.raises(ValueError, match=rf"generation_config\.json: {field} .* ids end at"):
        data.HFTokenizer(hf_directory)


def test_hf_usual_names_are_those_of_added_tokens(hf_directory):
    """A vocabulary trained on HTML has an ordinary token `</s>`."""
    content = json.loads((hf_directory / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] == "<|im_end|>"]
    content["post_processor"] = None
    write(hf_directory, "tokenizer.json", content)
    tokenizer = data.HFTokenizer(hf_directory)
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id) == ((3,), None, 3)


def test_hf_faults(hf_directory):
    write(hf_directory, "tokenizer_config.json", {"eos_token": "<absent>"})
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: the EOS token is unknown; set `eos_token`"
    ):
        data.HFTokenizer(hf_directory)
    (hf_directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        data.HFTokenizer(hf_directory)
    (hf_directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        data.HFTokenizer(hf_directory)


def test_load_tokenizer_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.model: no such tokenizer; check"):
        data.load_tokenizer(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.bin: unknown kind of tokenizer"):
        data.load_tokenizer(tmp_path / "a.bin")
    (tmp_path / "a.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"a\.model: not a SentencePiece model"):
        data.load_tokenizer(tmp_path / "a.model")
    data.train_sentencepiece(TEXTS, tmp_path / "tokenizer.model", 48)
    assert data.load_tokenizer(tmp_path).vocab_size == 48
