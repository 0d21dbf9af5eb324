"""What model folders hold, read from their headers alone: for `diffuspec check`, and to refuse a wrong pair early."""

from dataclasses import dataclass
from pathlib import Path

from drafters.diffusion.vocabulary_map import VocabularyMap, compare_vocabularies
from transformer.config import CheckpointError, TransformerConfig
from transformer.folder import read_vocabulary
from transformer.weights import check_weights, read_headers


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """One checkpoint."""

    folder: Path
    config: TransformerConfig
    num_parameters: int
    num_bytes: int  # of the weights
    dtypes: tuple[str, ...]
    vocabulary: dict[str, int] | None  # token -> id of its tokenizer; None without one

    @property
    def family(self) -> str:
        return self.config.architecture if self.config.family is None else self.config.family.name


def read_folder(folder: Path) -> FolderFacts:
    """Look at a checkpoint without loading it. Raises CheckpointError with one clear sentence."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder, and no checkpoint of the hub that is on this machine; "
            "`diffuspec pull NAME` fetches one."
        )
    config = TransformerConfig.from_folder(folder)
    stored = read_headers(folder)
    check_weights(folder, config, stored)
    return FolderFacts(
        folder=folder,
        config=config,
        num_parameters=sum(tensor.num_entries for tensor in stored.values()),
        num_bytes=sum(tensor.num_bytes for tensor in stored.values()),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored.values()})),
        vocabulary=read_vocabulary(folder),
    )


def find_mismatch(target: FolderFacts, drafter: FolderFacts) -> str | None:
    """Why the drafter cannot draft for the target; None if it can.

    Drafts are verified, so a wrong drafter would cost no correctness: it would only never be right, unnoticed.
    """
    if not drafter.config.mask_token_ids:
        return f"{drafter.folder} names no mask token in config.json, so it is not a diffusion language model."
    if not target.vocabulary:
        return f"{target.folder} has no tokenizer.json."
    if not drafter.vocabulary:
        return (
            f"{drafter.folder} has no tokenizer (tokenizer.json, or vocab.json): nothing says which tokens its ids "
            "stand for."
        )
    if max(drafter.vocabulary.values()) >= drafter.config.vocabulary_size:
        return (
            f"{drafter.folder} has {drafter.config.vocabulary_size} token ids in config.json, but its tokenizer goes "
            f"up to {max(drafter.vocabulary.values())}."
        )
    wanted, given = drafter.config.target_hidden_size, target.config.hidden_size
    if wanted not in (0, given):
        return (
            f"{drafter.folder} was trained on hidden states of {wanted} numbers, and those of {target.folder} have "
            f"{given}: it belongs to another target."
        )
    relation = relate(target, drafter).relation
    if wanted and relation != "identical":
        return f"{drafter.folder} reads hidden states, and for that needs the very tokens of {target.folder}."
    if relation == "disjoint" and not (drafter.folder / "tokenizer.json").exists():
        return (
            f"{drafter.folder} has another vocabulary than the target, and its tokenizer is Python code, which is "
            "never run; a tokenizer.json would do."
        )
    return None


def relate(target: FolderFacts, drafter: FolderFacts) -> VocabularyMap:
    """Compare the tokenizers of two folders that both have one."""
    assert target.vocabulary
    assert drafter.vocabulary
    return compare_vocabularies(target.vocabulary, drafter.vocabulary)
