"""Drafters whose vocabulary differs from the target's: draft in shared tokens, or in text (see `vocabulary_map`).

Verification keeps both exact. They differ in cost and acceptance.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from drafters.base import Tokens
from drafters.diffusion.drafter import DiffusionDrafter
from drafters.diffusion.masked import MaskedRequest, split_rows
from drafters.diffusion.vocabulary_map import VocabularyMap

MIN_CONFIDENCE, MAX_CONFIDENCE = 1e-6, 0.999  # of a token in retokenized text


class MappedDrafter:
    """Draft in the tokens that both vocabularies have.

    A context token that the drafter lacks is spelled in tokens that it has. A draft ends where the drafter's best token
    is one that the target lacks.
    """

    def __init__(
        self,
        drafter: DiffusionDrafter,
        vocabularies: VocabularyMap,
        vocabulary_size: int,
        spell: Callable[[int], Sequence[int]],
    ) -> None:
        """Map between the ids of `drafter` and those of the target.

        vocabulary_size: width of the target's logits. spell: returns the drafter's ids for a target token that the
        drafter lacks; may be empty.
        """
        self._drafter = drafter
        self._spell = spell
        self._to_drafter, self._to_target = vocabularies.to_drafter, vocabularies.to_target
        shared = np.flatnonzero((self._to_drafter >= 0) & (np.arange(len(self._to_drafter)) < vocabulary_size))
        self._target_ids = torch.from_numpy(shared)
        self._drafter_ids = torch.from_numpy(self._to_drafter[shared].astype(np.int64))
        self._vocabulary_size = vocabulary_size
        self._translated: dict[
            str, tuple[int, Tokens]
        ] = {}  # by request: number of target tokens read, and their translation

    @property
    def max_tokens(self) -> int:
        return self._drafter.max_tokens

    @property
    def temperature(self) -> float:
        return self._drafter.temperature

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        done, translated = self._translated.get(request_id, (0, ()))
        return self._drafter.pending_rows(request_id, len(translated) + num_tokens - done)

    def propose(self, requests: Sequence[MaskedRequest]) -> Tensor:
        """See `MaskedDrafter.propose`."""
        inner = [MaskedRequest(r.request_id, self._translate(r), r.length) for r in requests]
        drafted = self._drafter.propose(inner)
        device = drafted.device
        logits = drafted.new_full((len(drafted), self._vocabulary_size), -torch.inf)
        logits[:, self._target_ids.to(device)] = drafted[:, self._drafter_ids.to(device)]
        best = drafted.argmax(-1).cpu().numpy()
        has_image = self._to_target[np.minimum(best, len(self._to_target) - 1)] >= 0
        for rows in split_rows([request.length for request in requests]):
            missing = np.flatnonzero(~has_image[rows])
            if len(missing):
                logits[rows.start + missing[0] : rows.stop] = -torch.inf
        logits[drafted.isnan().any(-1)] = torch.nan
        return logits

    def note(self, request_id: str, num_accepted: int) -> None:
        self._drafter.note(request_id, num_accepted)

    def release(self, request_id: str) -> None:
        self._translated.pop(request_id, None)
        self._drafter.release(request_id)

    def _translate(self, request: MaskedRequest) -> Tokens:
        done, known = self._translated.get(request.request_id, (0, np.empty(0, np.int32)))
        fresh = request.tokens[done:]
        images = self._to_drafter[np.minimum(fresh, len(self._to_drafter) - 1)]
        if (images < 0).any():
            spelled = [
                [image] if image >= 0 else self._spell(token)
                for image, token in zip(images.tolist(), fresh.tolist(), strict=True)
            ]
            images = np.array([token for tokens in spelled for token in tokens], np.int32)
        translated = np.concatenate([known, images.astype(np.int32)])
        if len(translated) == 0:
            translated = np.zeros(1, np.int32)  # nothing is readable: give the drafter any token, rather than none
        self._translated[request.request_id] = len(request.tokens), translated
        return translated


class Codec(Protocol):
    """A tokenizer, as far as drafting needs one."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, without special tokens; invalid UTF-8 becomes U+FFFD."""

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text; none for special tokens."""


@dataclass(slots=True)
class _Reading:
    """The tokens that the drafter has read for one request."""

    anchor: int  # index of the first target token that is read
    tokens: Tokens  # in the drafter's vocabulary


class RetokenizingDrafter:
    """Read and draft text, for vocabularies that have little in common.

    Every call tokenizes the request's latest text for the drafter, and the drafted text for the target. A target
    token's confidence is the product of the confidences of the drafter's tokens that begin in it. The rest of the
    probability is spread evenly.
    """

    def __init__(
        self,
        drafter: DiffusionDrafter,
        target: Codec,
        reader: Codec,
        vocabulary_size: int,
        end_tokens: Mapping[int, int],
    ) -> None:
        """Connect `drafter` to the target through text.

        target: the target's tokenizer. reader: the drafter's. vocabulary_size: width of the target's logits.
        end_tokens: the target's end token for each end token of the drafter.
        """
        self._drafter = drafter
        self._target, self._reader = target, reader
        self._vocabulary_size = vocabulary_size
        self._end_tokens = dict(end_tokens)
        self._readings: dict[str, _Reading] = {}

    @property
    def max_tokens(self) -> int:
        return self._drafter.max_tokens

    @property
    def temperature(self) -> float:
        return 1.0

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        reading = self._readings.get(request_id)
        known = num_tokens if reading is None else len(reading.tokens) + 1
        return self._drafter.pending_rows(request_id, known)

    def propose(self, requests: Sequence[MaskedRequest]) -> Tensor:
        """See `MaskedDrafter.propose`."""
        inner = [MaskedRequest(r.request_id, self._read(r), r.length) for r in requests]
        drafted = self._drafter.propose(inner)
        is_broken = drafted.isnan().any(-1).cpu()
        confidences, tokens = drafted.softmax(-1).max(-1)
        confidences, tokens = confidences.cpu(), tokens.cpu()
        logits = torch.full((len(tokens), self._vocabulary_size), -torch.inf)
        for rows in split_rows([request.length for request in requests]):
            draft = self._rewrite(tokens[rows].tolist(), confidences[rows].tolist())
            for row, (token, confidence) in zip(range(rows.start, rows.stop), draft, strict=False):
                logits[row] = float(np.log((1 - confidence) / self._vocabulary_size))
                logits[row, token] = float(np.log(confidence))
        logits[is_broken] = torch.nan
        return logits

    def note(self, request_id: str, num_accepted: int) -> None:
        self._drafter.note(request_id, num_accepted)

    def release(self, request_id: str) -> None:
        self._readings.pop(request_id, None)
        self._drafter.release(request_id)

    def _read(self, request: MaskedRequest) -> Tokens:
        """Return the request's latest text in the drafter's tokens. Cached tokens stay as far as they are unchanged."""
        window = self._drafter.window
        known = self._readings.get(request.request_id)
        anchor = max(0, len(request.tokens) - window) if known is None else known.anchor
        if len(request.tokens) - anchor > 2 * window:
            anchor = len(request.tokens) - window
        text = self._target.decode(request.tokens[anchor:].tolist())
        tokens = np.array(self._reader.encode(text) or [0], np.int32)
        if known is not None:
            shorter = min(len(known.tokens), len(tokens))
            different = np.flatnonzero(known.tokens[:shorter] != tokens[:shorter])
            self._drafter.keep(request.request_id, int(different[0]) if len(different) else shorter)
        self._readings[request.request_id] = _Reading(anchor, tokens)
        return tokens

    def _rewrite(self, drafted: list[int], confidences: list[float]) -> list[tuple[int, float]]:
        """Return the draft in the target's tokens, with a confidence for each."""
        pieces: list[bytes] = []
        end: tuple[int, float] | None = None
        for token, confidence in zip(drafted, confidences, strict=True):
            piece = self._reader.bytes_of(token)
            if not piece or np.isnan(confidence):  # a special token, or a row that ends the draft
                if token in self._end_tokens and not np.isnan(confidence):
                    end = self._end_tokens[token], confidence
                break
            pieces.append(piece)
        text = b"".join(pieces).decode("utf-8", "replace").rstrip("�")
        starts = np.cumsum([0, *[len(piece) for piece in pieces[:-1]]]) if pieces else np.empty(0, np.int64)
        draft, begin = [], 0
        for token in self._target.encode(text):
            stop = begin + len(self._target.bytes_of(token))
            inside = [confidences[i] for i in np.flatnonzero((starts >= begin) & (starts < stop))]
            draft.append((token, float(np.prod(inside))))
            begin = stop
        if end is not None:
            draft.append(end)
        return [(token, min(max(sure, MIN_CONFIDENCE), MAX_CONFIDENCE)) for token, sure in draft]
