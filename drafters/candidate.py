"""One request's draft in the making, and what is remembered of the request from step to step."""

import operator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from drafters.base import Draft, DraftRequest, PolicyName
from drafters.estimates import Floats, RequestAgreement
from drafters.length import PaperLength
from drafters.search.path_search import Path

IDLE_STEPS = 4  # without a draft under `goodput`, until a request rests
MAX_REST_STEPS = 32  # steps in a row in which a resting request isn't looked at: looking costs time, too
REST_STEPS_PER_REQUEST = 8  # the same, for each request of the batch

_RESTING = Draft(bypass_reason="resting")
_NO_ROOM = Draft(bypass_reason="no_room")
_NOT_WORTH_IT = Draft(bypass_reason="not_worth_it")
_NO_CANDIDATES = Draft(bypass_reason="no_candidates")


@dataclass(slots=True)
class RequestState:
    """What the pipeline remembers of one request, until `release`."""

    paper: PaperLength
    heat: int  # class of its temperature
    agreement: RequestAgreement = field(default_factory=RequestAgreement)
    num_learned: int = 0  # committed tokens that the causal model has learned from
    confidences: Floats = field(default_factory=lambda: np.empty(0))  # raw ones, of the draft that is being verified
    num_searched: int = 0  # its tokens that the path search chose; the free draft chose the others
    rival: tuple[int, ...] = ()  # the free draft that it was preferred to
    expected_gain: float = 0.0  # accepted tokens over that one's
    forecast_class: tuple[int, int] = (0, 0)
    idle_steps: int = 0  # in a row for which `goodput` drafted nothing
    rest_steps: int = 0  # still to come in which it isn't looked at
    waited_steps: int = 0  # looked at without a diffusion pass, since the last one

    def note(self, is_drafted: bool, num_requests: int) -> None:
        """After a step under `goodput`: rest ever longer while nothing is worth drafting, in full batches above all."""
        self.idle_steps = 0 if is_drafted else self.idle_steps + 1
        if self.idle_steps >= IDLE_STEPS:
            longest = min(REST_STEPS_PER_REQUEST * num_requests, MAX_REST_STEPS)
            self.rest_steps = min(2 ** (self.idle_steps - IDLE_STEPS), longest)


@dataclass(slots=True)
class Candidate:
    """One request's draft in the making: first the free one, then perhaps a searched path in its place."""

    request: DraftRequest
    state: RequestState
    policy: PolicyName
    cap: int  # most tokens
    is_resting: bool = False
    tokens: tuple[int, ...] = ()
    confidences: Floats = field(default_factory=lambda: np.empty(0))  # [tokens] raw
    diffusion_length: int = 0  # tokens to ask of a diffusion pass; 0: no pass
    forecast_class: tuple[int, int] = (0, 0)
    path: Path | None = None  # what the search found; `tokens` begin with it
    free_tokens: tuple[int, ...] = ()  # the free draft, where a path has taken its place
    free_confidences: Floats = field(default_factory=lambda: np.empty(0))
    accepted: Floats | None = None  # [1 + longest] expected accepted tokens of the free draft, by its length
    gains: Floats | None = None  # [1 + longest] expected accepted tokens over the free draft's, by length

    @property
    def num_searched(self) -> int:
        return 0 if self.path is None else len(self.path.tokens)

    @property
    def no_draft(self) -> Draft:
        """What stands for a draft where none may be made."""
        return _RESTING if self.is_resting else _NO_ROOM

    def take_path(self, path: Path) -> None:
        """Draft what the search has found instead of the free draft."""
        self.free_tokens, self.free_confidences = self.tokens, self.confidences
        self.path, self.tokens, self.confidences = path, path.tokens, path.confidences

    def drop_path(self) -> None:
        """Draft freely after all."""
        self.path, self.tokens, self.confidences = None, self.free_tokens, self.free_confidences

    def extend(self, tokens: tuple[int, ...], confidences: Floats) -> None:
        """Draft these after what there is."""
        self.tokens += tokens
        self.confidences = np.concatenate([self.confidences, confidences])

    def draft(self, length: int, calibrated: Floats) -> Draft:
        """The draft, cut to `length` tokens, whose estimated acceptance is `calibrated` `[length]`; none if 0."""
        if self.cap == 0:
            return self.no_draft
        path = self.path
        if length == 0:
            none = _NOT_WORTH_IT if self.tokens else _NO_CANDIDATES
            return none if path is None else replace(none, **_found(path))
        chances = calibrated.tolist()
        return Draft(
            tokens=self.tokens[:length],
            source="diffusion" if path else "free",
            confidences=tuple(chances),
            expected_accepted=sum(accumulate(chances, operator.mul)),
            **({} if path is None else _found(path)),
        )


def _found(path: Path) -> dict[str, Any]:
    """What a search tells of a draft."""
    return {"raw_length": path.raw_length, "lattice_width": path.lattice_width, "path_gain": path.gain}
