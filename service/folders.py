"""What model folders hold, read from their headers alone: for `diffuspec check`, and to refuse a wrong pair early."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer.config import CheckpointError, TransformerConfig

MOST_HEADER_BYTES = 100 << 20  # what safetensors itself allows


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """One checkpoint."""

    folder: Path
    config: TransformerConfig
    num_parameters: int
    num_bytes: int  # of the weights
    dtypes: tuple[str, ...]
    vocabulary: dict[str, int] | None  # token -> id of its tokenizer.json; None without one


def read_folder(folder: Path) -> FolderFacts:
    """Raises CheckpointError with one clear sentence."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder.")
    config = TransformerConfig.from_folder(folder)
    tensors = weight_tensors(folder)
    sizes = [tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors]
    return FolderFacts(
        folder=folder,
        config=config,
        num_parameters=sum(_count(tensor["shape"]) for tensor in tensors),
        num_bytes=sum(sizes),
        dtypes=tuple(sorted({tensor["dtype"] for tensor in tensors})),
        vocabulary=_vocabulary(folder / "tokenizer.json"),
    )


def weight_tensors(folder: Path) -> list[dict[str, Any]]:
    """`dtype`, `shape` and `data_offsets` of every tensor. Raises CheckpointError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file; other formats are not loaded.")
    return [tensor for file in files for tensor in _tensors(file)]


def find_mismatch(target: FolderFacts, drafter: FolderFacts) -> str | None:
    """Why the drafter cannot draft for the target; None if it can.

    Drafts are verified, so a wrong drafter would cost no correctness: it would only never be right, unnoticed.
    """
    if not drafter.config.mask_token_ids:
        return f"{drafter.folder} names no mask token in config.json, so it is not a diffusion language model."
    known = target.vocabulary
    if known is None or drafter.vocabulary is None:
        return None
    if drafter.config.vocabulary_size < len(known):
        size = drafter.config.vocabulary_size
        return f"{drafter.folder} has {size} token ids, fewer than the {len(known)} of the target."
    different = [token for token, index in known.items() if drafter.vocabulary.get(token) != index]
    if different:
        return (
            f"{drafter.folder} has another tokenizer than the target: {len(different)} of {len(known)} tokens differ, "
            f"for instance {different[0]!r}."
        )
    return None


def _tensors(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MOST_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        return [tensor for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}).") from None


def _count(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _vocabulary(path: Path) -> dict[str, int] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary: dict[str, int] = content["model"]["vocab"] | added
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}).") from None
    return vocabulary
