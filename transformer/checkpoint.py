"""Weights from model.safetensors, in one file or in shards. Nothing that could run code is ever opened."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformer.config import CheckpointError, TransformerConfig, read_json

__all__ = ["CheckpointError", "load_weights", "weight_shapes"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Every weight that the configuration calls for, by its name in the hub's layout."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocabulary_size, hidden)}
    if config.target_hidden_size:
        shapes["model.target_projection.weight"] = (hidden, config.target_hidden_size)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        if config.query_key_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, queries)
        if config.output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocabulary_size, hidden)
    return shapes


def load_weights(
    folder: Path,
    config: TransformerConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Load every weight of `weight_shapes` onto `device` as `dtype`.

    `progress` is called with the loaded fraction, 0 to 1. Weights that the configuration does not call for are left
    unread. Raises CheckpointError if a file is missing or damaged, or a weight is missing, misshapen or not a float.
    """
    files = weight_files(folder)
    wanted = weight_shapes(config)
    missing = [name for name in wanted if name not in files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: the weight {missing[0]}{more} is missing, which config.json calls for.")
    weights: dict[str, Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(files[name], []).append(name)
    for path, names in by_file.items():
        with open_file(path) as file:
            for name in names:
                try:
                    tensor = file.get_tensor(name)
                except SafetensorError:
                    raise CheckpointError(
                        f"{path}: the weight {name} is missing, although the index names it."
                    ) from None
                if tuple(tensor.shape) != wanted[name]:
                    shapes = f"{list(tensor.shape)}, and config.json calls for {list(wanted[name])}"
                    raise CheckpointError(f"{path}: the weight {name} has the shape {shapes}.")
                if tensor.dtype not in FLOAT_TYPES:
                    known = "float32, float16 and bfloat16"
                    raise CheckpointError(f"{path}: the weight {name} is {tensor.dtype}; supported are {known}.")
                weights[name] = tensor.to(device=device, dtype=dtype, copy=True)
                if progress is not None:
                    progress(len(weights) / len(wanted))
    return weights


def weight_files(folder: Path) -> dict[str, Path]:
    """The file of every stored weight. Raises CheckpointError if there are none."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        with open_file(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.exists():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are loaded.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: the field 'weight_map' is missing.")
    files = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} is no file name within the folder.")
        files[name] = folder / shard
    return files


def open_file(path: Path) -> safe_open:
    """Open one safetensors file on the CPU. Raises CheckpointError if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}).") from None
