"""Facts about checkpoints, read from file headers only: for `diffuspec check`, and to refuse a wrong pair early.

A checkpoint is a folder, or a GGUF file.
"""

from dataclasses import dataclass
from pathlib import Path

from drafters.diffusion.vocabulary_map import VocabularyMap, compare_vocabularies
from service.text.gguf_tokenizer import Vocabulary
from transformer.config import CheckpointError, TransformerConfig
from transformer.folder import read_vocabulary
from transformer.weights import check_weights, read_headers


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """Facts about one checkpoint."""

    folder: Path  # or the GGUF file
    config: TransformerConfig
    num_parameters: int
    num_bytes: int  # of the weights
    dtypes: tuple[str, ...]
    vocabulary: dict[str, int] | None  # the tokenizer's ids by token; None without a tokenizer

    @property
    def family(self) -> str:
        return self.config.architecture if self.config.family is None else self.config.family.name


def read_folder(folder: Path) -> FolderFacts:
    """Inspect a checkpoint without loading it. Raises CheckpointError with one clear sentence."""
    if not folder.exists():
        raise CheckpointError(
            f"{folder} is neither a folder nor a GGUF file nor a hub checkpoint on this machine; `diffuspec pull NAME` "
            "fetches one."
        )
    config = TransformerConfig.read(folder)
    stored = read_headers(folder)
    check_weights(folder, config, stored)
    return FolderFacts(
        folder=folder,
        config=config,
        num_parameters=sum(tensor.num_entries for tensor in stored.values()),
        num_bytes=sum(tensor.num_bytes for tensor in stored.values()),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored.values()})),
        vocabulary=_read_vocabulary(folder),
    )


def _read_vocabulary(checkpoint: Path) -> dict[str, int] | None:
    if checkpoint.is_file():
        return {token: index for index, token in enumerate(Vocabulary.of(checkpoint).tokens)}
    return read_vocabulary(checkpoint)


def find_mismatch(target: FolderFacts, drafter: FolderFacts) -> str | None:
    """Return why the drafter cannot draft for the target, or None if it can.

    Drafts are verified, so a wrong drafter would not change any output. It would silently never be right.
    """
    if not drafter.config.mask_token_ids:
        return f"{drafter.folder} is not a diffusion language model: its configuration names no mask token."
    if not target.vocabulary:
        return f"{target.folder} has no tokenizer.json."
    if not drafter.vocabulary:
        return (
            f"{drafter.folder} has no tokenizer (tokenizer.json or vocab.json), so the meaning of its token ids is "
            "unknown."
        )
    if max(drafter.vocabulary.values()) >= drafter.config.vocabulary_size:
        return (
            f"{drafter.folder} has {drafter.config.vocabulary_size} token ids in config.json, but its tokenizer has "
            f"ids up to {max(drafter.vocabulary.values())}."
        )
    wanted, given = drafter.config.target_hidden_size, target.config.hidden_size
    if wanted not in (0, given):
        return (
            f"{drafter.folder} was trained on hidden states of size {wanted}, but those of {target.folder} have size "
            f"{given}: it belongs to another target."
        )
    relation = relate(target, drafter).relation
    if wanted and relation != "identical":
        return f"{drafter.folder} reads hidden states, so it needs exactly the vocabulary of {target.folder}."
    if relation == "disjoint" and not (drafter.folder / "tokenizer.json").exists():
        return (
            f"{drafter.folder} has a different vocabulary from the target's, and its tokenizer is Python code, which "
            "is never run: add a tokenizer.json."
        )
    return None


def relate(target: FolderFacts, drafter: FolderFacts) -> VocabularyMap:
    """Compare the vocabularies of two folders. Both must have a tokenizer."""
    assert target.vocabulary
    assert drafter.vocabulary
    return compare_vocabularies(target.vocabulary, drafter.vocabulary)
