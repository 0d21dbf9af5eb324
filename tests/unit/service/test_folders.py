"""Looking into model folders: facts, mismatches, and the table of `diffuspec check`."""

import io
import json
from pathlib import Path

import pytest

from service.check import check
from service.folders import find_mismatch, read_folder, relate
from service.settings import load_settings
from tests.checkpoints import VOCABULARY_SIZE, build_model, write_block_drafter, write_checkpoint
from transformer.config import CheckpointError


def test_facts_come_from_the_headers(tiny_target: Path) -> None:
    facts = read_folder(tiny_target)
    parameters = sum(parameter.numel() for parameter in build_model("llama").parameters())
    assert facts.num_parameters == parameters
    assert facts.num_bytes == 4 * parameters
    assert facts.dtypes == ("F32",)
    assert facts.vocabulary is not None
    assert len(facts.vocabulary) == 257
    assert facts.config.vocabulary_size == VOCABULARY_SIZE


def test_the_tiny_pair_fits_together(tiny_target: Path, tiny_drafter: Path) -> None:
    assert find_mismatch(read_folder(tiny_target), read_folder(tiny_drafter)) is None


def test_a_causal_model_is_no_drafter(tiny_target: Path) -> None:
    target = read_folder(tiny_target)
    assert "no mask token" in str(find_mismatch(target, target))


def test_another_tokenizer_is_found_out(tiny_target: Path, tmp_path: Path) -> None:
    write_block_drafter(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    target, drafter = read_folder(tiny_target), read_folder(tmp_path)
    assert find_mismatch(target, drafter) is None  # it can draft, if not as cheaply
    vocabularies = relate(target, drafter)
    assert (vocabularies.relation, vocabularies.num_shared, vocabularies.num_same_id) == ("overlapping", 257, 255)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        read_folder(tmp_path / "none")
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        read_folder(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="only safetensors"):
        read_folder(tmp_path)


def test_check_prints_a_table(tiny_target: Path, tiny_drafter: Path) -> None:
    output = io.StringIO()
    settings = load_settings(overrides={"model.target": str(tiny_target), "model.drafter": str(tiny_drafter)})
    assert check(settings, output) == 0
    text = output.getvalue()
    assert "257 tokens" in text
    assert "block of 32" in text
    assert "The vocabularies match" in text


def test_check_fails_with_a_sentence(tmp_path: Path) -> None:
    output = io.StringIO()
    assert check(load_settings(overrides={"model.target": str(tmp_path)}), output) == 1
    assert output.getvalue().count("\n") == 1
    assert "config.json does not exist" in output.getvalue()
