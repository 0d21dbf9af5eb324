from collections.abc import Sequence
from pathlib import Path

import pytest

from service.bench.prompts import (
    PromptError,
    Text,
    batches,
    cut_prompts,
    file_texts,
    folder_texts,
    held_out_texts,
    whole_prompts,
)

TEXTS = [Text(f"file-{i}", "".join(chr(97 + (i + j) % 26) for j in range(50 + 10 * i))) for i in range(5)]


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_pieces_have_the_length_and_stand_in_their_text() -> None:
    content = {text.name: encode(text.text) for text in TEXTS}
    for prompt in cut_prompts(TEXTS, 12, 40, encode, seed=3):
        name, start = prompt.name.split("@")
        assert list(prompt.tokens) == content[name][int(start) : int(start) + 40]


def test_the_seed_decides_the_places() -> None:
    assert cut_prompts(TEXTS, 12, 40, encode, seed=3) == cut_prompts(TEXTS, 12, 40, encode, seed=3)
    assert cut_prompts(TEXTS, 12, 40, encode, seed=3) != cut_prompts(TEXTS, 12, 40, encode, seed=4)


def test_every_text_is_used_before_any_is_used_again() -> None:
    names = [prompt.name.split("@")[0] for prompt in cut_prompts(TEXTS, 10, 40, encode, seed=0)]
    assert sorted(names[:5]) == sorted(names[5:]) == [text.name for text in TEXTS]


def test_texts_that_are_too_short_are_passed_over() -> None:
    names = {prompt.name.split("@")[0] for prompt in cut_prompts(TEXTS, 6, 85, encode, seed=0)}
    assert names == {"file-4"}
    with pytest.raises(PromptError, match="no text has 91 tokens"):
        cut_prompts(TEXTS, 1, 91, encode, seed=0)


def test_held_out_texts_are_the_ones_the_training_left_out() -> None:
    from models.training.corpus import standard_library

    trained = {document.name for document in standard_library() if not document.held_out}
    texts = held_out_texts()
    assert len(texts) > 20
    assert not trained & {text.name for text in texts}


def test_a_folder_gives_its_python_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("import os\n")
    (tmp_path / "notes.txt").write_text("not Python")
    assert folder_texts(tmp_path) == [Text("inner/a.py", "import os\n")]
    with pytest.raises(PromptError, match="no Python file"):
        folder_texts(tmp_path / "inner" / "none")


def test_prompts_of_a_json_lines_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "import os\\n\\nimport re"}\n\n{"prompt": "x", "name": "ignored"}\n')
    assert [text.text for text in file_texts(path)] == ["import os\n\nimport re", "x"]


@pytest.mark.parametrize("line", ["{}", '{"prompt": 3}', '{"prompt": ""}', "[]", "nothing"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{line}\n')
    with pytest.raises(PromptError, match="line 2"):
        file_texts(path)


def test_blocks_of_a_text_file_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\ndef f(x):\n    return x\n\n   \nimport os")
    assert file_texts(path) == [Text("prompts.txt:1", "def f(x):\n    return x\n"), Text("prompts.txt:2", "import os")]


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match="prompts"):
        file_texts(path)


def test_whole_prompts_keep_their_end_and_are_repeated() -> None:
    prompts = whole_prompts([Text("a", "abcdef"), Text("b", "xy")], 5, 4, encode)
    assert [bytes(prompt.tokens) for prompt in prompts] == [b"cdef", b"xy", b"cdef", b"xy", b"cdef"]


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 7), (3, [3, 3]), (8, [])])
def test_batches_are_full(size: int, sizes: Sequence[int]) -> None:
    prompts = cut_prompts(TEXTS, 7, 10, encode, seed=0)
    grouped = batches(prompts, size)
    assert [len(batch) for batch in grouped] == sizes
    assert [prompt for batch in grouped for prompt in batch] == prompts[: sum(sizes)]
