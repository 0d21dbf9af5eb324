"""Drafters for the engine's tests. Each implements `Pipeline` in full, and drafts by a rule of its own."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from drafters.base import Draft, DraftingCost, DraftRequest, StepRecord

Rule = Callable[[DraftRequest], Sequence[int]]
"""Returns the draft for a request. It is cut to the request's limit."""


class RuleDrafter:
    """Drafts by a rule, and records what the engine told it."""

    def __init__(self, rule: Rule, max_draft_tokens: int) -> None:
        self._rule = rule
        self.max_draft_tokens = max_draft_tokens
        self.description = "a rule"
        self.drafter_up = True
        self.num_failures = 0
        self.last_cost = DraftingCost()
        self.remembered: set[str] = set()  # requests that were proposed for and not released
        self.steps: list[StepRecord] = []
        self.costs: dict[int, float] = {}

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
        self.remembered.update(request.request_id for request in requests)
        drafts = []
        for request in requests:
            tokens = tuple(int(token) for token in self._rule(request)[: request.max_draft_tokens])
            drafts.append(
                Draft(tokens, "free", (0.5,) * len(tokens)) if tokens else Draft(bypass_reason="no_candidates")
            )
        return drafts

    def observe(self, step: StepRecord) -> None:
        self.steps.append(step)

    def release(self, request_id: str) -> None:
        self.remembered.discard(request_id)

    def calibrate(self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None) -> None:
        self.costs = dict(verify_seconds)


class Oracle:
    """A rule that knows the right continuation, from full sequences (prompt and output) given beforehand."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]

    def __call__(self, request: DraftRequest) -> list[int]:
        length = len(request.tokens)
        for sequence in self._sequences:
            if len(sequence) > length and (sequence[:length] == request.tokens).all():
                return [int(token) for token in sequence[length:]]
        return []


def no_drafts() -> RuleDrafter:
    """Return a drafter that never drafts: plain decoding."""
    return RuleDrafter(lambda _: (), 0)


def _noise(request: DraftRequest, salt: int) -> np.random.Generator:
    """Return random numbers that depend on the request's tokens only, not on who else is in the batch."""
    return np.random.default_rng([salt, len(request.tokens), int(request.tokens[-1])])


def garbage(vocabulary_size: int) -> Rule:
    """Return a rule that drafts as many random tokens as allowed."""
    return lambda request: _noise(request, 1).integers(vocabulary_size, size=request.max_draft_tokens).tolist()


def right_for_a_while(oracle: Rule, vocabulary_size: int) -> Rule:
    """Return a rule whose drafts have a random length, are right up to a random place, and garbage after it."""

    def draft(request: DraftRequest) -> list[int]:
        noise = _noise(request, 2)
        right = list(oracle(request))[: int(noise.integers(0, 8))]
        wrong = noise.integers(vocabulary_size, size=int(noise.integers(0, 8)))
        return [*right, *wrong.tolist()]

    return draft


def never_right(oracle: Rule, vocabulary_size: int) -> Rule:
    """Return a rule that always drafts the id after the right token's."""
    return lambda request: [(token + 1) % vocabulary_size for token in oracle(request)]


def all_but_the_last(oracle: Rule, vocabulary_size: int) -> Rule:
    """Return a rule whose drafts of 8 tokens are wrong in the last: a recovered token could pass for a bonus there."""

    def draft(request: DraftRequest) -> list[int]:
        tokens = list(oracle(request))[: min(8, request.max_draft_tokens)]
        return [*tokens[:-1], (tokens[-1] + 1) % vocabulary_size] if tokens else []

    return draft
