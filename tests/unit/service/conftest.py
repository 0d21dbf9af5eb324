"""A tokenizer for tests of text, with one token per byte."""

import pytest

from service.text.tokenizer import TextTokenizer
from tests.checkpoints import END_TOKEN, write_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TextTokenizer.from_folder(folder, (END_TOKEN,))
