"""Folders that load, and clear messages about folders that don't."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import END_TOKEN, VOCABULARY_SIZE, write_block_drafter, write_checkpoint, write_full_drafter
from transformer.checkpoint import CheckpointError
from transformer.config import RotaryScaling, TransformerConfig
from transformer.model import RowBatch, Transformer


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def remove(path: Path, *fields: str) -> None:
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in fields})
    )


def edit_weights(folder: Path, **changed: torch.Tensor | None) -> None:
    """Replace weights of the single file, by name with `__` for dots; None removes one."""
    path = folder / "model.safetensors"
    weights = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def test_the_configuration_equals_the_folders_config_json(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3", tied=False)
    config = TransformerConfig.from_folder(tmp_path)
    assert (config.architecture, config.vocabulary_size, config.num_layers) == ("qwen3", VOCABULARY_SIZE, 2)
    assert (config.num_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.query_key_norm
    assert not config.attention_bias
    assert not config.tie_word_embeddings
    assert config.end_token_ids == (END_TOKEN,)
    assert (config.mask_token_ids, config.logits_shifted, config.attention) == ((), False, "causal")


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit(tmp_path / "generation_config.json", eos_token_id=[256, 7])
    assert TransformerConfig.from_folder(tmp_path).end_token_ids == (256, 7)
    (tmp_path / "generation_config.json").unlink()
    assert TransformerConfig.from_folder(tmp_path).end_token_ids == (256,)


def test_rotary_fields_of_older_versions_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    remove(tmp_path / "config.json", "rope_parameters")
    edit(tmp_path / "config.json", rope_theta=123.0, rope_scaling={"type": "linear", "factor": 2.0})
    config = TransformerConfig.from_folder(tmp_path)
    assert (config.rope_theta, config.rotary_scaling) == (123.0, RotaryScaling("linear", 2.0))


def test_diffusion_fields_are_read(tmp_path: Path) -> None:
    write_block_drafter(tmp_path / "block", num_masks=5, block_size=6)
    block = TransformerConfig.from_folder(tmp_path / "block")
    assert block.mask_token_ids == tuple(range(VOCABULARY_SIZE, VOCABULARY_SIZE + 5))
    assert (block.attention, block.block_size, block.logits_shifted) == ("block", 6, True)
    write_full_drafter(tmp_path / "full")
    full = TransformerConfig.from_folder(tmp_path / "full")
    assert (full.attention, full.mask_token_ids) == ("full", (VOCABULARY_SIZE,))


def test_dream_is_a_shifted_bidirectional_qwen2(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2")
    edit(tmp_path / "config.json", model_type="Dream", mask_token_id=260)
    config = TransformerConfig.from_folder(tmp_path)
    assert (config.architecture, config.attention, config.logits_shifted) == ("qwen2", "full", True)
    assert config.mask_token_ids == (260,)
    assert config.attention_bias


def test_sharded_checkpoint_equals_the_single_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", "qwen2", tied=False)
    write_checkpoint(tmp_path / "many", "qwen2", tied=False, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    rows = RowBatch(torch.arange(20), [0], [0], [20])
    fractions: list[float] = []
    models = [Transformer.load(tmp_path / "one"), Transformer.load(tmp_path / "many", progress=fractions.append)]
    first, second = (model.logits(model.forward(rows, model.new_cache(1, 20))) for model in models)
    assert torch.equal(first, second)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "needs the field 'low_freq_factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"num_key_value_heads": 3}, "cannot be grouped evenly"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_size": "wide"}, "wrong kind"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"mask_token_ids": [100_000]}, "within the vocabulary"),
        ({"mask_token_ids": [3], "attention": "block"}, "block_size"),
        ({"mask_token_ids": [3], "attention": "diagonal"}, "'diagonal'"),
    ],
)
def test_unsupported_configuration_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    write_checkpoint(tmp_path)
    edit(tmp_path / "config.json", **fields)
    with pytest.raises(CheckpointError, match=sentence):
        TransformerConfig.from_folder(tmp_path)


def test_missing_or_broken_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Transformer.load(tmp_path)
    write_checkpoint(tmp_path)
    remove(tmp_path / "config.json", "vocab_size")
    with pytest.raises(CheckpointError, match="'vocab_size' is missing"):
        Transformer.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Transformer.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        Transformer.load(tmp_path)


def test_missing_weight_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit_weights(tmp_path, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        Transformer.load(tmp_path)


def test_misshapen_weight_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit_weights(tmp_path, model__norm__weight=torch.ones(5))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has the shape \[5\]"):
        Transformer.load(tmp_path)


def test_weight_that_is_not_a_float_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit_weights(tmp_path, model__norm__weight=torch.ones(32, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int8"):
        Transformer.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 900, 20_000])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="damaged"):
        Transformer.load(tmp_path)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        Transformer.load(tmp_path)


def test_missing_shard_is_named_and_no_file_outside_the_folder_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    content = (tmp_path / shard).read_bytes()
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} does not exist"):
        Transformer.load(tmp_path)
    (tmp_path / shard).write_bytes(content)
    edit(index, weight_map={"model.norm.weight": "../other.safetensors"})
    with pytest.raises(CheckpointError, match="no file name within the folder"):
        Transformer.load(tmp_path)
    edit(index, weight_map=None)
    with pytest.raises(CheckpointError, match="'weight_map' is missing"):
        Transformer.load(tmp_path)
