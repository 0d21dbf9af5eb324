"""`diffuspec check` and `diffuspec compile`: look at the model folders, or load them once, without serving."""

from pathlib import Path
from typing import TextIO

from drafters.ngram import NgramError
from service.folders import FolderFacts, find_mismatch, read_folder
from service.settings import NO_DRAFTER, PROMPT_LOOKUP, Settings
from service.text.tokenizer import TokenizerError
from service.wiring import build_tokenizer, load_parts
from transformer.config import CheckpointError


def check(settings: Settings, output: TextIO) -> int:
    """Print a table; returns 0 if the server could load this, else 1."""
    try:
        target = read_folder(settings.model.target)
        choice = settings.model.drafter_choice
        drafter = None if choice in (PROMPT_LOOKUP, NO_DRAFTER) else read_folder(Path(choice))
        if target.vocabulary is None:
            raise CheckpointError(f"{target.folder} has no tokenizer.json.")
    except CheckpointError as error:
        print(f"diffuspec: {error}", file=output)
        return 1
    columns = [("", "target", "drafter")]
    left, right = _column(target), _column(drafter) if drafter else {"folder": choice}
    columns += [(name, left[name], right.get(name, "")) for name in left]
    widths = [max(len(row[column]) for row in columns) for column in range(3)]
    for row in columns:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=output)
    mismatch = None if drafter is None else find_mismatch(target, drafter)
    if mismatch is not None:
        print(f"\ndiffuspec: {mismatch}", file=output)
        return 1
    if drafter is not None:
        share = drafter.num_bytes / target.num_bytes
        print(f"\nThe vocabularies match; the drafter has {share:.0%} of the target's bytes.", file=output)
    return 0


def compile_kernels(settings: Settings, output: TextIO) -> int:
    """Load everything as `serve` would, which compiles what is not compiled yet, and let go of it."""
    try:
        load_parts(settings, build_tokenizer(settings.model.target).size, lambda what, done: None)
    except (CheckpointError, NgramError, TokenizerError, ValueError) as error:
        print(f"diffuspec: {error}", file=output)
        return 1
    return 0


def _column(facts: FolderFacts) -> dict[str, str]:
    config = facts.config
    masks = len(config.mask_token_ids)
    return {
        "folder": str(facts.folder),
        "architecture": config.architecture,
        "layers": str(config.num_layers),
        "hidden size": str(config.hidden_size),
        "heads": f"{config.num_heads} over {config.num_key_value_heads}, {config.head_dim} wide",
        "parameters": f"{facts.num_parameters / 1e6:.2f}M",
        "weights": f"{facts.num_bytes / 1e6:.1f} MB ({', '.join(facts.dtypes)})",
        "context": f"{config.max_positions} tokens",
        "token ids": str(config.vocabulary_size),
        "tokenizer": "none" if facts.vocabulary is None else f"{len(facts.vocabulary)} tokens",
        "end tokens": ", ".join(map(str, config.end_token_ids)) or "none",
        "attention": config.attention + (f", block of {config.block_size}" if config.block_size else ""),
        "mask tokens": str(masks) if masks else "none",
    }
