import pytest

from jaxrl_stable import data


@pytest.fixture(scope="session")
def source():
    return data.ArithmeticSource(60)


@pytest.fixture(scope="session")
def tokenizer(source, tmp_path_factory):
    texts = [text for problem in source for text in problem.values()]
    return data.train_sentencepiece(texts, tmp_path_factory.mktemp("spm") / "a.model", 96)
