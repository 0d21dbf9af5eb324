"""Checks of a pair before anything is loaded: they read file headers only and run before the port opens."""

from pathlib import Path

from service.folders import FolderFacts, find_mismatch, read_folder
from service.setting_groups import NO_DRAFTER, PROMPT_LOOKUP
from service.settings import Settings
from transformer.config import CheckpointError


def check_models(settings: Settings) -> tuple[FolderFacts, FolderFacts | None]:
    """Return the facts of target and drafter (None without a diffusion drafter).

    Raises CheckpointError with one clear sentence if the service can't start with them.
    """
    model = settings.model
    target = read_folder(model.target)
    refuse_unfit_target(target)
    if model.context_length is not None and model.context_length > target.config.max_positions:
        raise CheckpointError(
            f"model.context_length is {model.context_length}, but the target supports at most "
            f"{target.config.max_positions} tokens."
        )
    if not wants_drafter(settings):
        return target, None
    drafter = read_folder(Path(model.drafter_choice))
    mismatch = find_mismatch(target, drafter)
    if mismatch is not None:
        raise CheckpointError(mismatch)
    return target, drafter


def refuse_unfit_target(target: FolderFacts) -> None:
    """Raise CheckpointError if it is no causal model with a tokenizer, whose text could be served."""
    if not target.folder.is_file() and not (target.folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{target.folder} has no tokenizer.json.")
    if target.config.attention != "causal":
        raise CheckpointError(
            f"{target.folder} is a diffusion language model ({target.family}), which can only draft: name a causal "
            "model as the target."
        )


def refuse_gguf(target: Path) -> None:
    """Raise CheckpointError if the target of the vLLM engine is a GGUF file."""
    if target.is_file():
        folder = target.name.removesuffix(".gguf")
        raise CheckpointError(
            f"vLLM loads folders, and {target} is a file: run `diffuspec convert {target} {folder}`, then serve with "
            f"--target {folder}."
        )


def wants_drafter(settings: Settings) -> bool:
    """Return whether the settings ask for a diffusion drafter."""
    speculation = settings.speculation
    is_wanted = speculation.diffusion and speculation.max_draft_tokens > 0
    return is_wanted and settings.model.drafter_choice not in (PROMPT_LOOKUP, NO_DRAFTER)
