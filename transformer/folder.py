"""Read a checkpoint's small JSON files. Also defines the error for unusable folders."""

import json
from pathlib import Path
from typing import Any


class CheckpointError(Exception):
    """A model folder is unusable. The message says what is wrong with which file."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError if the file is missing or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token -> id of the folder's tokenizer, added tokens included; None without a tokenizer.

    Reads tokenizer.json. If the tokenizer is a Python class (Dream), reads vocab.json, added_tokens.json and
    tokenizer_config.json. Raises CheckpointError if a file cannot be read.
    """
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            content = read_json(path)
            vocabulary: dict[str, int] = _plain_vocabulary(content["model"]["vocab"])
            return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        path = folder / "vocab.json"
        if not path.exists():
            return None
        vocabulary = read_json(path)
        path = folder / "added_tokens.json"
        vocabulary |= read_json(path) if path.exists() else {}
        path = folder / "tokenizer_config.json"
        added = read_json(path).get("added_tokens_decoder", {}) if path.exists() else {}
        return vocabulary | {token["content"]: int(index) for index, token in added.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error!r}).") from None


def _plain_vocabulary(vocabulary: Any) -> dict[str, int]:
    """Return token -> id. BPE and WordPiece store an object, Unigram a list of tokens with scores."""
    if isinstance(vocabulary, list):
        return {token: index for index, (token, _) in enumerate(vocabulary)}
    return {str(token): int(index) for token, index in vocabulary.items()}


def read_mask_token(folder: Path) -> int | None:
    """Return the id of the tokenizer's mask token; None if there is no such token or no tokenizer."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        token = read_json(path).get("mask_token") if path.exists() else None
        if isinstance(token, dict):
            token = token.get("content")
        vocabulary = read_vocabulary(folder) if isinstance(token, str) else None
        if vocabulary is not None and token in vocabulary:
            return vocabulary[token]
    return None
