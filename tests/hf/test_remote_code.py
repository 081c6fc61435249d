"""Checkpoints whose `auto_map` names code of their own, exported with that code or without."""

import json

import pytest

from jaxrl_stable import hf
from jaxrl_stable.hf.remote_code import code_files, modules
from tests.hf import ours, raw

# Like Kimi's: its tokenizer has code, too, with a helper in a file of another name.
AUTO_MAP = {
    "AutoConfig": "configuration_own.Config",
    "AutoModel": "modeling_own.Model",
    "AutoModelForCausalLM": "modeling_own.LanguageModel",
}
CODE = {
    "configuration_own.py": "from transformers import PretrainedConfig\n",
    "modeling_own.py": "from .configuration_own import Config\nfrom .layers import A\n",
    "layers.py": "def f():\n    from . import deeper\n",
    "deeper.py": "from .layers import A\n",  # a circle
    "other.py": "",
}
TOKENIZER = {"tokenization_own.py": "from .typescript import encode\n", "typescript.py": ""}
MODEL_CODE = ["configuration_own.py", "deeper.py", "layers.py", "modeling_own.py"]


@pytest.fixture
def like(tmp_path):
    directory = raw.changed("qwen3.v5", origin(tmp_path), auto_map=AUTO_MAP)
    config = {"auto_map": {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for file, text in (CODE | TOKENIZER).items():
        (directory / file).write_text(text)
    return directory


def origin(tmp_path):
    (tmp_path / "origin").mkdir()
    return tmp_path / "origin"


def exported(like, **options):
    """Returns the `auto_map` and the Python files of an export."""
    target = like.parent / "out"
    hf.save(ours.load(like), target, like=like, **options)
    content = json.loads((target / "config.json").read_text())
    return content.get("auto_map"), sorted(file.name for file in target.glob("*.py"))


def test_the_code_comes_along_with_what_it_imports(like):
    auto_map, files = exported(like)
    assert auto_map == AUTO_MAP
    assert files == sorted([*MODEL_CODE, *TOKENIZER])
    assert (like.parent / "out" / "layers.py").read_text() == CODE["layers.py"]


@pytest.mark.parametrize("missing", MODEL_CODE)
def test_without_some_of_the_code_the_map_goes(like, missing):
    """Transformers would fail with `trust_remote_code=True`; its own classes do without."""
    (like / missing).unlink()
    assert exported(like) == (None, sorted(TOKENIZER))


def test_the_fused_layout_has_no_use_for_the_code(like):
    assert exported(like, layout="fused") == (None, sorted(TOKENIZER))


def test_code_of_another_repository_is_only_named(like):
    auto_map = {kind: f"owner/name--{named}" for kind, named in AUTO_MAP.items()}
    raw.changed("qwen3.v5", like, auto_map=auto_map)
    assert exported(like) == (auto_map, sorted(TOKENIZER))


def test_the_code_of_a_dense_model_is_not_that_of_its_upcycled_one(like, tmp_path):
    hf.upcycle(like, tmp_path / "moe", copies=2)
    assert "auto_map" not in json.loads((tmp_path / "moe" / "config.json").read_text())
    assert sorted(file.name for file in (tmp_path / "moe").glob("*.py")) == sorted(TOKENIZER)


@pytest.mark.fast
def test_a_name_does_not_lead_out_of_the_directory(like, tmp_path):
    (tmp_path / "secret.py").write_text("")
    (like / "a.py").write_text("from ..secret import x\n")  # transformers copies what is in it
    (like / "b.py").write_text("def broken(:\n")
    assert code_files(like, ["other"]) == [like / "other.py"]
    for name in ("../secret", "/etc/passwd", "", "b", "none", "a"):
        assert code_files(like, [name]) is None, name


@pytest.mark.fast
@pytest.mark.parametrize(
    ("auto_map", "files"),
    [
        (None, set()),
        (AUTO_MAP, {"configuration_own", "modeling_own"}),
        (["tokenization_own.Slow", None], {"tokenization_own"}),
        ({"AutoTokenizer": [None, "fast.Fast"]}, {"fast"}),
        ({"AutoModel": "owner/name--modeling_own.Model"}, set()),
        (3, set()),
    ],
)
def test_modules(auto_map, files):
    assert modules(auto_map) == files
