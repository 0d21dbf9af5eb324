"""`diffuspec convert`: write a GGUF file as the folder that transformers and vLLM load, with dequantised weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from service.folders import read_folder
from service.preflight import refuse_unfit_target
from service.text.tokenizer import TextTokenizer, TokenizerError
from transformer.config import CheckpointError
from transformer.gguf_model import GgufModel
from transformer.weights import INDEX_FILE, SINGLE_FILE, weight_shapes

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 4 << 30  # of one file; the values of one are in memory at a time
BYTES_OF_TYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


def run(source: Path, folder: Path, dtype: str, output: TextIO) -> int:
    """Convert, and say so. Returns the exit status."""
    import torch

    try:
        convert(source, folder, getattr(torch, dtype), lambda done: print(f"  {done:.0%}", file=output, flush=True))
    except (CheckpointError, TokenizerError, OSError) as error:
        print(f"diffuspec: {error}", file=output)
        return 1
    print(f"{folder} holds {source.name} as {dtype}; --target {folder} serves it, also with --engine vllm", file=output)
    return 0


def convert(
    source: Path, folder: Path, dtype: "torch.dtype", progress: Callable[[float], None] = lambda done: None
) -> None:
    """Write the model of a GGUF file into an empty or new folder: configurations, tokenizer, weights as `dtype`.

    `progress` gets the written fraction after each file. Raises CheckpointError, TokenizerError or OSError.
    """
    if not source.is_file():
        raise CheckpointError(f"{source} is no file; `convert` reads GGUF files.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder.")
    facts = read_folder(source)
    refuse_unfit_target(facts)
    model = GgufModel.open(source)
    tokenizer = TextTokenizer.read(source, facts.config.end_token_ids)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    name = str(dtype).removeprefix("torch.")
    shards = list(_shards(weight_shapes(facts.config), BYTES_OF_TYPE[name]))
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(model, names, folder / file, dtype)
        files |= dict.fromkeys(names, file)
        progress(number / len(shards))
    if len(shards) > 1:
        _write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": files})
    fields = model.config_fields()
    special = {key: fields[key] for key in ("bos_token_id", "eos_token_id") if fields[key] is not None}
    _write_json(folder / "generation_config.json", special)
    # Last, so that no half-written folder is taken for a model.
    _write_json(folder / "config.json", fields | {"torch_dtype": name, "dtype": name})


def _shards(shapes: dict[str, tuple[int, ...]], entry_bytes: int) -> Iterator[list[str]]:
    """Yield the names of the weights that share a file."""
    names: list[str] = []
    total = 0
    for name, shape in shapes.items():
        size = entry_bytes
        for length in shape:
            size *= length
        if names and total + size > MAX_SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _write(model: GgufModel, names: list[str], path: Path, dtype: "torch.dtype") -> None:
    import torch
    from safetensors.torch import save_file

    weights = {name: torch.from_numpy(model.dequantize(name)).to(dtype) for name in names}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody else read it


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
