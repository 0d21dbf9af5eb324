"""Checkpoint families: how they are told apart, and which ones are refused with a reason."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import HUB_DRAFTERS, MASK_TOKEN, write_checkpoint, write_hub_drafter
from transformer.checkpoint import CheckpointError
from transformer.config import TransformerConfig
from transformer.families import FAMILIES


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("dream", {"model_type": "gpt2"}, "DiffuGPT"),
        ("dream", {"model_type": "LLaDA2Moe"}, "model_type 'LLaDA2Moe' is not supported; known are llama"),
        ("dream", {"block_size": 32}, "of a later kind than Dream-v0"),
        ("sdar", {"dflash_config": {"target_layer_ids": [1, 9]}}, "DFlash drafters read hidden states"),
        ("sdar", {"num_experts": 128}, r"mixtures of experts \(num_experts: 128\)"),
        ("sdar", {"block_size": 4, "attention": "wide"}, "'wide' is none of"),
        ("llada", {"num_experts": 64}, "mixtures of experts"),
        ("llada", {"rope": False}, "rope False is not supported, only True"),
        ("llada", {"block_type": "sequential"}, "block_type 'sequential' is not supported"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias True"),
        ("llada", {"layer_norm_type": "default"}, "layer_norm_type 'default'"),
        ("llada", {"d_model": ..., "hidden_size": ...}, "'hidden_size' is missing"),
        ("fast-dllm", {"mask_token_id": 100_000}, "within the vocabulary"),
    ],
)
def test_unfit_checkpoints_are_refused_with_the_reason(
    tmp_path: Path, name: str, fields: dict[str, Any], sentence: str
) -> None:
    write_hub_drafter(tmp_path, name, layers=1)
    edit(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=sentence) as raised:
        TransformerConfig.from_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_plain_llama_is_causal_and_one_with_a_mask_token_is_diffullama(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", "llama")
    plain = TransformerConfig.from_folder(tmp_path / "plain")
    assert (plain.attention, plain.mask_token_ids) == ("causal", ())
    write_hub_drafter(tmp_path / "masked", "diffullama", layers=1)
    masked = TransformerConfig.from_folder(tmp_path / "masked")
    assert (masked.attention, masked.logits_shifted, masked.mask_token_ids) == ("full", True, (MASK_TOKEN,))


def test_config_json_overrides_the_familys_defaults(tmp_path: Path) -> None:
    write_hub_drafter(tmp_path, "a2d-qwen3-mdlm", layers=1)
    assert TransformerConfig.from_folder(tmp_path).attention == "full"
    edit(tmp_path, block_size=16, logits_shifted=True, mask_token_id=7)
    config = TransformerConfig.from_folder(tmp_path)
    assert (config.attention, config.block_size) == ("block_causal", 16)
    assert (config.logits_shifted, config.mask_token_ids) == (True, (7,))


def test_an_a2d_checkpoint_whose_tokenizer_has_no_mask_token_gets_the_next_id(tmp_path: Path) -> None:
    write_hub_drafter(tmp_path, "a2d-qwen2", layers=1)
    path = tmp_path / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["mask_token"]
    path.write_text(json.dumps(content))
    assert TransformerConfig.from_folder(tmp_path).mask_token_ids == (MASK_TOKEN + 1,)


@pytest.mark.parametrize("name", HUB_DRAFTERS)
def test_a_configuration_can_be_sent_to_another_process(tmp_path: Path, name: str) -> None:
    write_hub_drafter(tmp_path, name, layers=1)
    config = TransformerConfig.from_folder(tmp_path)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))


def test_every_family_has_a_tiny_checkpoint_in_the_tests(tmp_path: Path) -> None:
    types = {layout.config.get("model_type", layout.family) for layout in HUB_DRAFTERS.values()}
    assert set(FAMILIES) - types == {"qwen2", "qwen3", "a2d-llama"}  # the first two are causal, the last as A2D-Qwen2


def test_a_mask_token_may_be_in_the_special_tokens_map(tmp_path: Path) -> None:
    write_hub_drafter(tmp_path, "a2d-qwen3-mdlm", layers=1)
    path = tmp_path / "tokenizer_config.json"
    content = json.loads(path.read_text())
    mask = content.pop("mask_token")
    path.write_text(json.dumps(content))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": mask, "lstrip": False}}))
    assert TransformerConfig.from_folder(tmp_path).mask_token_ids == (MASK_TOKEN,)
