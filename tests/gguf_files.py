"""Write tiny GGUF files from the tiny checkpoints as llama.cpp converts them, with the writer of the package `gguf`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from tests.checkpoints import (
    CHAT_TEMPLATE,
    CONTEXT_LENGTH,
    END_OF_TEXT,
    END_TOKEN,
    VOCABULARY_SIZE,
    Family,
    build_model,
    byte_characters,
)

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
SIZES_OF_K: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}  # blocks have 256 entries
NAMES = {  # written out, not taken from the code under test
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens


@dataclass
class Content:
    """What a file will hold; change it before it is written."""

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, tuple[npt.NDArray[Any], str]] = field(default_factory=dict)  # stored array, type

    def write(self, path: Path) -> None:
        writer = GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            add(writer, key.replace("{arch}", self.architecture), value)
        for name, (stored, kind) in self.tensors.items():
            writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders: list[tuple[type, Callable[[str, Any], None]]] = [
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    ]
    next(adder for kind, adder in adders if isinstance(value, kind))(key, value)


def byte_vocabulary() -> dict[str, Any]:
    """Return the metadata of the tiny checkpoints' tokenizer: one token per byte, and one that ends the text."""
    tokens = [*byte_characters(), END_OF_TEXT]
    padding = [f"[PAD{index}]" for index in range(len(tokens), VOCABULARY_SIZE)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": [NORMAL] * 256 + [CONTROL] + [UNUSED] * len(padding),
        "tokenizer.ggml.eos_token_id": END_TOKEN,
        "tokenizer.ggml.bos_token_id": END_TOKEN,
        "tokenizer.ggml.padding_token_id": END_TOKEN,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def gguf_of(
    family: Family = "llama", kind: str = "F32", seed: int = 0, tied: bool = True, **overrides: Any
) -> tuple[Content, PreTrainedModel]:
    """Return a tiny random model as a file's content, matrices as `kind`, and transformers' model of the same values.

    `overrides` go into the model's configuration.
    """
    sizes = SIZES_OF_K if kind.endswith("_K") else SIZES
    model = build_model(family, seed, tied, **sizes | overrides)
    config = model.config
    parameters = config.rope_parameters
    metadata = {
        "{arch}.block_count": config.num_hidden_layers,
        "{arch}.context_length": CONTEXT_LENGTH,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.feed_forward_length": config.intermediate_size,
        "{arch}.attention.head_count": config.num_attention_heads,
        "{arch}.attention.head_count_kv": config.num_key_value_heads,
        "{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "{arch}.attention.key_length": config.head_dim,
        "{arch}.attention.value_length": config.head_dim,
        "{arch}.rope.freq_base": float(parameters["rope_theta"]),
    }
    content = Content(family, metadata | byte_vocabulary())
    if parameters["rope_type"] == "linear":
        content.metadata |= {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": parameters["factor"]}
    if parameters["rope_type"] == "llama3":
        factors = np.array(list(llama3_factors(config.head_dim, parameters)), np.float32)
        content.tensors["rope_freqs.weight"] = (factors, "F32")
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            is_turned = family == "llama" and any(part in name for part in (".q_proj.", ".k_proj."))
            values = parameter.numpy().astype(np.float32)
            if is_turned:
                values = turned(values, heads)
            stored, type_name = store(values, kind, generator) if values.ndim == 2 else (values, "F32")
            content.tensors[gguf_name(name)] = (stored, type_name)
            kept = dequantize(stored, GGMLQuantizationType[type_name]).astype(np.float32).reshape(values.shape)
            parameter.copy_(torch.from_numpy(turned_back(kept, heads) if is_turned else kept))
    return content, model


def store(values: npt.NDArray[np.float32], kind: str, generator: np.random.Generator) -> tuple[npt.NDArray[Any], str]:
    """Return a matrix in a type's layout. The package quantises to no K type: those get random blocks instead."""
    if not kind.endswith("_K"):
        return quantize(values, GGMLQuantizationType[kind]), kind
    num_bytes = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]
    blocks = generator.integers(0, 256, (values.shape[0], values.shape[1] // 256, num_bytes), np.uint8)
    scales = generator.uniform(1e-4, 2e-4, (*blocks.shape[:2], 1)).astype(np.float16)
    if kind == "Q6_K":
        blocks[..., 192:208] = generator.integers(1, 16, blocks[..., 192:208].shape)  # int8, small
        blocks[..., 208:] = scales.view(np.uint8)
    else:  # half a step of 15 or 31 times the scale is taken off again
        blocks[..., :2] = scales.view(np.uint8)
        blocks[..., 2:4] = (scales * (7 if kind == "Q4_K" else 15)).astype(np.float16).view(np.uint8)
    return blocks.reshape(values.shape[0], -1), kind


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def turned(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Reorder rows as llama.cpp's conversion does for `llama`: the two of a rotation side by side."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def turned_back(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def llama3_factors(head_dim: int, parameters: dict[str, Any]) -> Iterator[float]:
    """Yield the factor of every rotation as llama.cpp's conversion computes it."""
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    for index in range(0, head_dim, 2):
        length = 2 * math.pi * parameters["rope_theta"] ** (index / head_dim)
        if length < original / high:
            yield 1.0
        elif length > original / low:
            yield factor
        else:
            smooth = (original / length - low) / (high - low)
            yield 1 / ((1 - smooth) / factor + smooth)
