"""Pipelines for the tests of the vLLM engine: real ones, some that know the answer, useless ones and broken ones.

The worker loads `make`. It gives a `Switch`, whose inner pipeline a test in the same process may change.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from drafters.base import Draft, DraftingCost, DraftRequest, StepRecord

Propose = Callable[[Sequence[DraftRequest]], Any]


class Scripted:
    """Lets a function draft, and counts the steps."""

    description = "a script"
    drafter_up = True
    num_failures = 0
    last_cost = DraftingCost()
    reads_hidden_states = False

    def __init__(self, propose: Propose, max_draft_tokens: int = 8) -> None:
        self.max_draft_tokens = max_draft_tokens
        self.num_steps = 0
        self.observed: list[StepRecord] = []
        self.released: list[str] = []
        self._propose = propose

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> Any:
        self.num_steps += 1
        return self._propose(requests)

    def observe(self, step: StepRecord) -> None:
        self.observed.append(step)

    def release(self, request_id: str) -> None:
        self.released.append(request_id)

    def calibrate(
        self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None
    ) -> None: ...


class Switch:
    """Passes everything on to `inner`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def make(settings: Mapping[str, Any], device: str) -> Switch:
    """The service's own pipeline."""
    from service.wiring import load_vllm_pipeline

    return Switch(load_vllm_pipeline(settings, device))


def make_idle(settings: Mapping[str, Any], device: str) -> Switch:
    """For tests that bring their own."""
    return Switch(Scripted(lambda requests: [Draft()] * len(requests)))


def make_failing(settings: Mapping[str, Any], device: str) -> Scripted:
    """Raises at step 37, and works before and after."""
    return raising(37, RuntimeError("step 37"))


def draft(tokens: Sequence[int]) -> Draft:
    return Draft(tuple(tokens), "diffusion", (0.9,) * len(tokens), survival=(0.9,) * len(tokens))


def garbage(vocabulary_size: int) -> Scripted:
    """Random tokens, random lengths."""
    generator = random.Random(0)

    def propose(requests: Sequence[DraftRequest]) -> list[Draft]:
        return [
            draft([generator.randrange(vocabulary_size) for _ in range(generator.randint(0, request.max_draft_tokens))])
            for request in requests
        ]

    return Scripted(propose)


def oracle(texts: Sequence[Sequence[int]]) -> Scripted:
    """Drafts the right tokens for requests that follow one of `texts` so far; the last one is wrong now and then."""

    def propose(requests: Sequence[DraftRequest]) -> list[Draft]:
        drafts = []
        for request in requests:
            length = len(request.tokens)
            known = next((text for text in texts if np.array_equal(text[:length], request.tokens)), ())
            ahead = [int(token) for token in known[length : length + request.max_draft_tokens]]
            if length % 5 == 0 and ahead:
                ahead[-1] ^= 1
            drafts.append(draft(ahead))
        return drafts

    return Scripted(propose)


def raising(at_step: int, error: BaseException) -> Scripted:
    """Copies the last token, and raises at one step."""

    def propose(requests: Sequence[DraftRequest]) -> list[Draft]:
        if scripted.num_steps == at_step:
            raise error
        return [draft([int(request.tokens[-1])] * min(2, request.max_draft_tokens)) for request in requests]

    scripted = Scripted(propose)
    return scripted


def sleeping(at_step: int, seconds: float) -> Scripted:
    def propose(requests: Sequence[DraftRequest]) -> list[Draft]:
        if scripted.num_steps == at_step:
            time.sleep(seconds)
        return [draft([int(request.tokens[-1])] * min(2, request.max_draft_tokens)) for request in requests]

    scripted = Scripted(propose)
    return scripted


def nonsense(kind: str) -> Scripted:
    """Returns something that no drafter may return."""

    def propose(requests: Sequence[DraftRequest]) -> Any:
        count = len(requests)
        answers: dict[str, Any] = {
            "none": None,
            "too few": [draft([1])] * (count - 1),
            "too many": [draft([1])] * (count + 1),
            "none drafts": [None] * count,
            "beyond the vocabulary": [draft([10**6])] * count,
            "negative": [draft([-1])] * count,
            "floats": [draft([1.5])] * count,  # type: ignore[list-item]
            "texts": [draft(["a"])] * count,  # type: ignore[list-item]
            "too long": [draft([1] * 500)] * count,
            "numpy": [draft(np.array([1, 2]))] * count,  # type: ignore[arg-type]
        }
        return answers[kind]

    return Scripted(propose)


NONSENSE = (
    "none", "too few", "too many", "none drafts", "beyond the vocabulary", "negative", "floats", "texts", "too long",
    "numpy",
)  # fmt: skip
