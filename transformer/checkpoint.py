"""Load weights from safetensors, in one file or in shards, or from a GGUF file. No file that can run code is opened."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformer.config import CheckpointError, TransformerConfig
from transformer.gguf_model import GgufModel
from transformer.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    check_weights,
    named_files,
    read_headers,
    stored_names,
    weight_shapes,
)

__all__ = ["CheckpointError", "load_weights", "weight_shapes"]

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def load_weights(
    folder: Path,
    config: TransformerConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Load every weight of `weight_shapes` onto `device` as `dtype`, from a folder or a GGUF file.

    `progress` is called with the loaded fraction, 0 to 1. Weights that the configuration does not need are not read.
    Raises CheckpointError if a file is missing or damaged, or if a weight is missing, misshapen or not a float.
    """
    if folder.is_file():
        return load_gguf_weights(folder, config, device, dtype, progress)
    files = weight_files(folder)
    wanted, stored = weight_shapes(config), stored_names(config)
    missing = [name for name in stored.values() if name not in files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: the weight {missing[0]}{more} is missing, which its configuration calls for.")
    weights: dict[str, Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(files[stored[name]], []).append(name)
    for path, names in by_file.items():
        with open_file(path) as file:
            for name in names:
                try:
                    tensor = file.get_tensor(stored[name])
                except SafetensorError:
                    raise CheckpointError(
                        f"{path}: the weight {stored[name]} is missing, although the index names it."
                    ) from None
                if tuple(tensor.shape) != wanted[name]:
                    shapes = f"{list(tensor.shape)}, and its configuration calls for {list(wanted[name])}"
                    raise CheckpointError(f"{path}: the weight {stored[name]} has the shape {shapes}.")
                if tensor.dtype not in FLOAT_TYPES:
                    known = "float32, float16 and bfloat16"
                    raise CheckpointError(
                        f"{path}: the weight {stored[name]} is {tensor.dtype}; supported are {known}."
                    )
                # The tensor is a view of the mapped file. This is the only copy, made where it is used.
                weights[name] = tensor.to(device=device, dtype=dtype, copy=True)
                del tensor
                if progress is not None:
                    progress(len(weights) / len(wanted))
    return weights


def load_gguf_weights(
    path: Path,
    config: TransformerConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Load every weight of a GGUF file, dequantised. Raises CheckpointError as `load_weights` does."""
    check_weights(path, config, read_headers(path))
    model, names = GgufModel.open(path), list(weight_shapes(config))
    weights: dict[str, Tensor] = {}
    for name in names:
        weights[name] = torch.from_numpy(model.dequantize(name)).to(device=device, dtype=dtype)
        if progress is not None:
            progress(len(weights) / len(names))
    return weights


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of every stored weight. Raises CheckpointError if there are none."""
    single = folder / SINGLE_FILE
    if not single.exists():
        return named_files(folder / INDEX_FILE)
    with open_file(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_file(path: Path) -> safe_open:
    """Open one safetensors file on the CPU. Raises CheckpointError if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}).") from None
