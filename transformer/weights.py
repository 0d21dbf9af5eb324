"""The weights that a checkpoint needs, and the weights that its files' headers list. Opens no tensor.

Does not import torch, so that a folder can be checked before anything heavy is imported.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformer.config import TransformerConfig
from transformer.folder import CheckpointError, read_json
from transformer.gguf import GgufFile
from transformer.gguf_model import ROTARY_FACTORS

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # the limit of safetensors itself
FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_entries(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


def weight_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that the configuration requires, by its name in the hub's layout."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocabulary_size, hidden)}
    if config.target_hidden_size:
        shapes["model.target_projection.weight"] = (hidden, config.target_hidden_size)
    if config.takes_hints:
        shapes["model.hint_gates"] = (2, hidden)
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


def stored_names(config: TransformerConfig) -> dict[str, str]:
    """Return our name -> the name in the files, of every weight that the configuration requires."""
    family = config.family
    return {name: name if family is None else family.stored_name(name) for name in weight_shapes(config)}


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every stored tensor of a folder or a GGUF file by its name there.

    Raises CheckpointError for a missing or damaged file.
    """
    if folder.is_file():
        tensors = GgufFile.open(folder).tensors.values()
        return {each.name: StoredTensor(folder, each.type.name, each.shape, each.num_bytes) for each in tensors}
    single = folder / SINGLE_FILE
    if single.exists():
        return _read_header(single)
    files = named_files(folder / INDEX_FILE)
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(files.values())):
        stored |= _read_header(file)
    return {name: tensor for name, tensor in stored.items() if name in files}


def check_weights(folder: Path, config: TransformerConfig, stored: dict[str, StoredTensor]) -> None:
    """Raise CheckpointError unless every required weight is there, with the right shape and type.

    A GGUF file must hold nothing else: a weight that this transformer doesn't know would change the result.
    """
    names = stored_names(config)
    missing = [name for name in names.values() if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: the weight {missing[0]}{more} is missing, which its configuration calls for.")
    for ours, shape in weight_shapes(config).items():
        tensor = stored[names[ours]]
        if tensor.shape != shape:
            shapes = f"{list(tensor.shape)}, and its configuration calls for {list(shape)}"
            raise CheckpointError(f"{tensor.file}: the weight {names[ours]} has the shape {shapes}.")
        if tensor.dtype not in FLOAT_TYPES and not folder.is_file():  # a GGUF file's types have been checked
            known = "float32, float16 and bfloat16"
            raise CheckpointError(f"{tensor.file}: the weight {names[ours]} is {tensor.dtype}; supported are {known}.")
    unknown = sorted(set(stored) - set(names.values()) - {ROTARY_FACTORS}) if folder.is_file() else []
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"{folder}: the tensor {unknown[0]}{more} is not known in a {config.architecture} model.")


def named_files(index: Path) -> dict[str, Path]:
    """Return the file of every weight in the index of a sharded checkpoint. Raises CheckpointError."""
    if not index.exists():
        raise CheckpointError(
            f"{index.parent} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are loaded."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: the field 'weight_map' is missing.")
    files = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {shard!r} is no file name within the folder.")
        files[name] = index.parent / shard
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        size, needed = file.stat().st_size, 8 + length + max((end for _, end in spans.values()), default=0)
        if size < needed:
            raise ValueError(f"it has {size} bytes of {needed}: the download may have stopped early")
        return {
            name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), spans[name][1] - spans[name][0])
            for name, entry in header.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}).") from None
