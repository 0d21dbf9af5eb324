"""The split into training text and held-out text, and the files that are left out."""

from pathlib import Path

from models.training.corpus import Document, standard_library


def documents(root: Path) -> list[Document]:
    return list(standard_library(root))


def write_files(root: Path, names: list[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n" + "value = 1\n" * 40)


def test_the_split_depends_on_names_alone(tmp_path: Path) -> None:
    names = [f"package{i % 7}/module{i}.py" for i in range(200)]
    write_files(tmp_path / "all", names)
    write_files(tmp_path / "some", list(reversed(names[::2])))
    split = {document.name: document.held_out for document in documents(tmp_path / "all")}
    assert len(split) == 200
    assert 0 < sum(split.values()) < 40
    assert {document.name: document.held_out for document in documents(tmp_path / "some")}.items() <= split.items()


def test_known_files_stay_where_they_were(tmp_path: Path) -> None:
    names = [document.name for document in standard_library() if document.held_out]
    assert names == sorted(names)
    write_files(tmp_path, names[:5])
    assert all(document.held_out for document in documents(tmp_path))


def test_tables_duplicates_and_foreign_code_are_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, ["kept.py", "site-packages/other.py", "encodings/table.py", "badsyntax.py"])
    (tmp_path / "copy.py").write_bytes((tmp_path / "kept.py").read_bytes())
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "unicode.py").write_text("ä" * 500, encoding="utf-8")
    assert [document.name for document in documents(tmp_path)] == ["copy.py"]
