"""Build the diffusion drafter for a target: options from the settings, and a wrapper that bridges vocabularies."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drafters.diffusion.vocabulary_map import VocabularyMap
from service.folders import FolderFacts, read_folder, relate
from service.settings import Settings
from service.text.tokenizer import TextTokenizer
from transformer.config import TransformerConfig

if TYPE_CHECKING:
    from drafters.diffusion.masked import MaskedDrafter
    from transformer.model import Transformer

log = logging.getLogger(__name__)

USUAL_WINDOW, WINDOW_WITH_HIDDEN_STATES = 256, 32  # tokens
FIRST_WITH_HIDDEN_STATES = 12  # tokens that such a window begins with; more would cost more than they help

PATHS = {
    "identical": "takes and gives the target's ids as they are",
    "overlapping": "drafts in the tokens that both have, and cuts a draft at the first other one",
    "disjoint": "tokenizes drafted text again for the target",
}


@dataclass(frozen=True, slots=True)
class BuiltDrafter:
    """A drafter and its description."""

    drafter: "MaskedDrafter"
    vocabularies: VocabularyMap
    description: str


class TextCodec:
    """Adapts a tokenizer to `drafters.diffusion.vocabulary`: plain text, no special tokens."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def bytes_of(self, token: int) -> bytes:
        return b"" if token in self._tokenizer.special_ids else self._tokenizer.bytes_of(token)


def drafter_window(settings: Settings, drafter: TransformerConfig) -> int:
    """Return the maximum number of context tokens that a drafter reads."""
    usual = WINDOW_WITH_HIDDEN_STATES if drafter.target_hidden_size else USUAL_WINDOW
    return min(settings.speculation.window_tokens or usual, drafter.max_trained_tokens)


def first_tokens(settings: Settings, drafter: TransformerConfig) -> int | None:
    """Return how many tokens the drafter's window begins with, whenever it is read anew. None: as many as fit."""
    is_usual = settings.speculation.window_tokens is None and drafter.attention == "block"
    return FIRST_WITH_HIDDEN_STATES if is_usual and drafter.target_hidden_size else None


def build_drafter(settings: Settings, target: TransformerConfig, model: "Transformer") -> BuiltDrafter:
    """Wrap the loaded drafter `model` for the target of the settings. The vocabularies decide which wrapper.

    Raises CheckpointError or TokenizerError.
    """
    from drafters.diffusion.drafter import DiffusionDrafter, DiffusionOptions
    from drafters.diffusion.vocabulary import MappedDrafter, RetokenizingDrafter

    speculation, num_slots = settings.speculation, settings.scheduler.max_running
    theirs, ours = read_folder(settings.model.target), read_folder(Path(settings.model.drafter_choice))
    vocabularies = relate(theirs, ours)
    options = DiffusionOptions(
        window=drafter_window(settings, model.config),
        first_tokens=first_tokens(settings, model.config),
        refresh_interval=speculation.refresh_passes,
        refinement_steps=speculation.refinement_steps,
        part_tokens=speculation.draft_part_tokens,
        part_confidence=speculation.draft_part_confidence,
    )
    drafter: MaskedDrafter
    if vocabularies.relation == "identical":
        num_tokens = len(vocabularies.to_drafter)
        drafter = DiffusionDrafter(model, num_slots, target.vocabulary_size, options, num_tokens)
    else:
        width = model.config.vocabulary_size
        inner = DiffusionDrafter(model, num_slots, width, options, len(vocabularies.to_target))
        codec = TextCodec(TextTokenizer.read(theirs.folder, target.end_token_ids))
        reader = _reader(ours)
        if vocabularies.relation == "overlapping":
            speller = Speller(codec, reader)
            drafter = MappedDrafter(inner, vocabularies, target.vocabulary_size, speller)
        else:
            assert reader is not None  # find_mismatch has checked it
            ends = dict.fromkeys(model.config.end_token_ids, target.end_token_ids[0]) if target.end_token_ids else {}
            drafter = RetokenizingDrafter(inner, codec, reader, target.vocabulary_size, ends)
    relation = vocabularies.relation
    log.info(
        "vocabularies of target and drafter: %s (the drafter has %.1f%% of the target's tokens); the drafter %s",
        relation, 100 * vocabularies.overlap, PATHS[relation],
    )  # fmt: skip
    millions = ours.num_parameters / 1e6
    description = f"diffusion ({ours.family}, {model.config.attention}, {millions:.1f}M, {relation} vocabulary)"
    return BuiltDrafter(drafter, vocabularies, description)


class Speller:
    """Spells a token of the target in tokens of the drafter."""

    def __init__(self, target: TextCodec, reader: TextCodec | None) -> None:
        """reader: the drafter's tokenizer. None: tokens that the drafter lacks are left out."""
        self._target, self._reader = target, reader
        self._known: dict[int, tuple[int, ...]] = {}

    def __call__(self, token: int) -> Sequence[int]:
        if self._reader is None:
            return ()
        if token not in self._known:
            self._known[token] = tuple(self._reader.encode(self._target.decode([token])))
        return self._known[token]


def _reader(facts: FolderFacts) -> TextCodec | None:
    """Return the drafter's tokenizer, or None if it is Python code, which is never run."""
    if not (facts.folder / "tokenizer.json").exists():
        return None
    return TextCodec(TextTokenizer.from_folder(facts.folder, facts.config.end_token_ids))
