"""Model folders: facts, mismatches, and the table of `diffuspec check`."""

import io
import json
from pathlib import Path

import pytest
import torch

from service.check import CheckOptions, check
from service.folders import find_mismatch, read_folder, relate
from service.footprint import model_footprint
from service.settings import Settings, load_settings
from tests.checkpoints import (
    VOCABULARY_SIZE,
    OtherVocabulary,
    build_model,
    change_vocabulary,
    write_block_drafter,
    write_checkpoint,
    write_hub_drafter,
)
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
    assert find_mismatch(target, drafter) is None  # it can draft, but not as cheaply
    vocabularies = relate(target, drafter)
    assert (vocabularies.relation, vocabularies.num_shared, vocabularies.num_same_id) == ("overlapping", 257, 255)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder"):
        read_folder(tmp_path / "none")
    write_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        read_folder(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="only safetensors"):
        read_folder(tmp_path)


def pair_settings(target: Path, drafter: Path, **overrides: object) -> Settings:
    return load_settings(overrides={"model.target": str(target), "model.drafter": str(drafter)} | overrides)


def test_check_prints_a_table(tiny_target: Path, tiny_drafter: Path) -> None:
    output = io.StringIO()
    assert check(pair_settings(tiny_target, tiny_drafter), output, CheckOptions(bandwidth=10)) == 0
    text = output.getvalue()
    assert "257 tokens" in text
    assert "block of 32" in text
    assert "The vocabularies are identical: the drafter has 257 of the target's 257 tokens (100.0%)" in text
    assert "fits into the" in text


def test_check_says_what_a_step_costs_at_least(tiny_target: Path, tmp_path: Path) -> None:
    write_hub_drafter(tmp_path, "dream")
    output = io.StringIO()
    settings = pair_settings(tiny_target, tmp_path, **{"model.dtype": "bfloat16"})
    assert check(settings, output, CheckOptions(context=100, batch=3, bandwidth=2)) == 0
    text = output.getvalue()
    target, drafter = read_folder(tiny_target), read_folder(tmp_path)
    per_token = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, width, bytes
    step = 2 * target.num_parameters + 300 * per_token  # bytes; the embedding is tied, so all of it is read
    draft = 2 * (drafter.num_parameters - VOCABULARY_SIZE * 32) + 300 * per_token
    assert f"{step / 2e9 * 1e6:.1f} us per step" in text
    assert f"{draft / 2e9 * 1e6:.1f} us per draft" in text
    assert f"{1 + draft / step:.2f} tokens per step" in text
    assert "of the next position (shifted)" in text
    assert "Dream" in text
    assert "attends in both directions" in text
    assert "A smaller drafter or a larger target would pay sooner" in text


@pytest.mark.parametrize(("kind", "relation"), [("rotated", "overlapping"), ("byte-names", "disjoint")])
def test_check_names_the_way_between_two_vocabularies(
    tiny_target: Path, tmp_path: Path, kind: OtherVocabulary, relation: str
) -> None:
    write_hub_drafter(tmp_path, "sdar")
    change_vocabulary(tmp_path, kind)
    output = io.StringIO()
    assert check(pair_settings(tiny_target, tmp_path), output, CheckOptions(bandwidth=10)) == 0
    assert f"The vocabularies are {relation}: " in output.getvalue()
    assert "The drafter drafts at most 4 tokens in a pass." in output.getvalue()


def test_a_pair_larger_than_the_memory_does_not_pass(tiny_target: Path, tiny_drafter: Path) -> None:
    output = io.StringIO()
    assert check(pair_settings(tiny_target, tiny_drafter), output, CheckOptions(batch=10**9, bandwidth=10)) == 1
    assert "does NOT fit into" in output.getvalue()


def test_memory_in_use_is_what_was_said(tiny_target: Path) -> None:
    from transformer.model import Transformer

    config = read_folder(tiny_target).config
    said = model_footprint(config, "bfloat16", on_cpu=True, num_cached=20)
    model = Transformer.load(tiny_target, dtype=torch.bfloat16)
    assert model.new_cache(1, 20).entries.nbytes == said.cache_bytes
    kept = [model._embedding, model._head._weight]
    for layer in model._layers:
        kept += [layer.qkv._weight, layer.output._weight, layer.gate_up._weight, layer.down._weight]
    assert sum(tensor.nbytes for tensor in kept) == pytest.approx(said.weight_bytes, rel=0.01)  # the norms are folded


def test_check_fails_with_a_sentence(tmp_path: Path) -> None:
    output = io.StringIO()
    assert check(load_settings(overrides={"model.target": str(tmp_path)}), output) == 1
    assert output.getvalue().count("\n") == 1
    assert "config.json does not exist" in output.getvalue()
