"""GGUF files: the same model as from a folder, in every type; damaged and unsupported ones are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from tests.checkpoints import END_TOKEN, FAMILIES, Family
from tests.gguf_files import TYPES, Content, gguf_of
from tests.unit.transformer.test_model import (
    LENGTH,
    TOLERANCE,
    largest_difference,
    random_tokens,
    reference_logits,
    run_in_chunks,
)
from transformer.config import CheckpointError, TransformerConfig
from transformer.gguf import GgufFile
from transformer.gguf_model import GgufModel
from transformer.model import Transformer
from transformer.weights import check_weights, read_headers, weight_shapes

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS: list[tuple[Family, str, dict[str, Any]]] = [
    *((family, kind, {}) for family in FAMILIES for kind in TYPES),
    *((family, "Q8_0", {"tied": False}) for family in FAMILIES),
    ("llama", "Q4_1", {"attention_bias": True}),
    ("qwen3", "Q4_1", {"attention_bias": True}),
    ("llama", "F16", {"num_key_value_heads": 4}),
    ("llama", "Q8_0", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    ("llama", "Q8_0", {"rope_parameters": LLAMA3}),
]


@pytest.mark.parametrize(("family", "kind", "overrides"), VARIANTS)
def test_a_file_is_the_same_model_as_the_folder_of_its_values(
    tmp_path: Path, family: Family, kind: str, overrides: dict[str, Any]
) -> None:
    content, reference = gguf_of(family, kind, **overrides)
    content.write(tmp_path / "model.gguf")
    reference.save_pretrained(tmp_path / "folder")
    config = TransformerConfig.read(tmp_path / "model.gguf")
    from_folder = TransformerConfig.read(tmp_path / "folder")
    assert replace(config, family=None) == replace(from_folder, family=None)
    tokens = random_tokens(LENGTH)
    ours = run_in_chunks(Transformer.load(tmp_path / "model.gguf"), tokens, [LENGTH])
    theirs = run_in_chunks(Transformer.load(tmp_path / "folder"), tokens, [LENGTH])
    assert torch.equal(ours, theirs)
    scale = max(1.0, float(theirs.abs().max()) / 10)  # random blocks give larger logits
    assert largest_difference(ours, reference_logits(reference, tokens)) < 2 * TOLERANCE * scale


@pytest.mark.parametrize("kind", TYPES)
def test_raw_blocks_have_the_rows_of_the_hubs_order(tmp_path: Path, kind: str) -> None:
    content, reference = gguf_of("llama", kind)
    content.write(tmp_path / "model.gguf")
    model = GgufModel.open(tmp_path / "model.gguf")
    weights = reference.state_dict()
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        type_name, blocks = model.raw_blocks(name)
        stored = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        values = dequantize(np.ascontiguousarray(blocks).view(stored), GGMLQuantizationType[type_name])
        assert np.array_equal(values, weights[name].numpy())


def test_a_file_names_every_token_that_ends_a_turn(tmp_path: Path) -> None:
    content, _ = gguf_of()
    tokens, types = content.metadata["tokenizer.ggml.tokens"], content.metadata["tokenizer.ggml.token_type"]
    tokens[3], types[3] = "<|im_end|>", 3
    tokens[4], types[4] = "</s>", 1  # written so in plain text
    content.metadata["tokenizer.ggml.eot_token_id"] = 7
    content.write(tmp_path / "model.gguf")
    assert TransformerConfig.read(tmp_path / "model.gguf").end_token_ids == (END_TOKEN, 7, 3)


def set_metadata(**values: Any) -> Callable[[Content], None]:
    """`_` stands for a dot after the architecture's name: attention_head_count."""

    def change(content: Content) -> None:
        for key, value in values.items():
            name = key.replace("__", ".")
            content.metadata = {k: v for k, v in content.metadata.items() if k != name and k != "{arch}." + name}
            if value is not ...:
                content.metadata[name if name.split(".")[0] in ("general", "split") else "{arch}." + name] = value

    return change


def set_tensor(name: str, array: Any, kind: str = "F32") -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content.tensors = {key: value for key, value in content.tensors.items() if key != name}
        if array is not None:
            content.tensors[name] = (array, kind)

    return change


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def rename(content: Content) -> None:
    content.architecture = "mamba"


UNFIT: dict[str, tuple[Callable[[Content], None], str]] = {
    "architecture": (rename, "the architecture 'mamba' is not supported; known are llama, qwen2, qwen3"),
    "adapter": (set_metadata(general__type="adapter"), "holds no model, but 'adapter'"),
    "split": (set_metadata(split__count=3, split__no=1), "is part 2 of 3 of a split file"),
    "experts": (set_metadata(expert_count=8), "mixtures of experts (llama.expert_count) is not supported"),
    "window": (set_metadata(attention__sliding_window=64), "sliding-window attention"),
    "partial rotary": (set_metadata(rope__dimension_count=8), "llama.rope.dimension_count is 8, and heads are 16 wide"),
    "layers that differ": (set_metadata(attention__head_count_kv=[1, 2]), "one whole number is needed"),
    "field": (set_metadata(block_count=...), "llama.block_count is missing"),
    "kind of field": (set_metadata(embedding_length="wide"), "llama.embedding_length is 'wide'"),
    "layers": (set_metadata(block_count=1 << 31), "the tensor blk.2147483647.attn_norm.weight is missing"),
    "heads": (set_metadata(attention__head_count=0), "head_count is 0"),
    "yarn": (set_metadata(rope__scaling__type="yarn"), "rope type 'yarn' is not supported"),
    "factors": (
        set_tensor("rope_freqs.weight", zeros(8) + 3),
        "rope_freqs.weight are none of Llama 3's",
    ),
    "missing": (set_tensor("blk.1.ffn_up.weight", None), "the weight blk.1.ffn_up.weight is missing"),
    "no embedding": (set_tensor("token_embd.weight", None), "the tensor token_embd.weight is missing"),
    "shape": (set_tensor("blk.1.ffn_up.weight", zeros(95, 64)), "blk.1.ffn_up.weight has the shape [95, 64]"),
    "unknown": (set_tensor("blk.0.ffn_gate_inp.weight", zeros(4, 64)), "the tensor blk.0.ffn_gate_inp.weight is not"),
    "type": (
        set_tensor("blk.0.ffn_up.weight", np.zeros((96, 64), np.int8), "I8"),
        "the tensor blk.0.ffn_up.weight is I8; supported are F32, F16",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), UNFIT.values(), ids=UNFIT.keys())
def test_unfit_files_are_refused_with_the_reason(
    tmp_path: Path, change: Callable[[Content], None], sentence: str
) -> None:
    content, _ = gguf_of("llama", "F32")
    change(content)
    path = tmp_path / "model.gguf"
    content.write(path)
    with pytest.raises(CheckpointError) as raised:
        check_weights(path, TransformerConfig.read(path), read_headers(path))
    assert sentence in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for data, sentence in ((b"", "it has 0 bytes"), (b"PK\x03\x04" * 99, "no GGUF file"), (b"GGUF\x01\0\0\0", "1")):
        path = tmp_path / f"{len(data)}.gguf"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=sentence):
            GgufFile.open(path)


def load_all(path: Path) -> None:
    model, config = GgufModel.open(path), TransformerConfig.read(path)
    check_weights(path, config, read_headers(path))
    for name in weight_shapes(config):
        model.dequantize(name)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content, _ = gguf_of("llama", "Q4_1")
    content.write(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    load_all(tmp_path / "whole.gguf")
    lengths = [*range(0, 64), *np.random.default_rng(0).integers(64, len(data) - 32, 60)]
    for length in lengths:
        path = tmp_path / "cut.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load_all(path)


def test_damaged_bytes_in_the_header_give_one_sentence_or_another_model(tmp_path: Path) -> None:
    content, _ = gguf_of("llama", "Q4_1", layers=1)
    content.write(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    end = min(tensor.offset for tensor in GgufFile.open(tmp_path / "whole.gguf").tensors.values())
    generator = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(data)
        for place in generator.integers(4, end, generator.integers(1, 4)):
            damaged[place] = generator.choice([0, 1, 0x7F, 0xFF, generator.integers(0, 256)])
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        try:
            load_all(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017
        path.unlink()
