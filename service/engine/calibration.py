"""Measures once, at start-up, what verification costs on this machine."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from verifiers.base import SamplingRules, Verifier, VerifyRequest

ROWS = (1, 16, 4, 8, 2)  # measured whatever a step takes: without them no draft could be weighed
MORE_ROWS = (64, 32)  # measured while the budget lasts
REQUESTS = (16, 4)  # the same, of plain passes
CONTEXT_TOKENS = 256  # behind each request, as an ordinary one has
SLOW_CONTEXT_TOKENS = 16  # for a model whose plain step takes long: its weights dominate the step
SLOW_STEP_SECONDS = 0.05
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class VerifySeconds:
    """Median seconds of verification passes."""

    by_rows: dict[int, float]  # of as few requests as hold the rows
    by_requests: dict[int, float]  # of plain passes: one row for each request


def measure_verify_seconds(
    verifier: Verifier, max_draft_tokens: int, clock: Callable[[], float], budget_seconds: float = 1.4
) -> VerifySeconds:
    """Measure passes of several sizes, each request with an ordinary context and at most `max_draft_tokens` drafted.

    The sizes of `ROWS` are measured once in any case, if the slots can hold them; more sizes and further rounds take
    `budget_seconds` at most. Overwrites the verifier's slots.
    """
    generator = np.random.default_rng(0)
    tokens = generator.integers(verifier.vocabulary_size, size=verifier.context_length, dtype=np.int32)
    _pass_seconds(verifier, tokens, [1], 0, clock)
    is_slow = _pass_seconds(verifier, tokens, [1], 0, clock) > SLOW_STEP_SECONDS
    context = min(SLOW_CONTEXT_TOKENS if is_slow else CONTEXT_TOKENS, verifier.context_length // 2)
    max_rows = min(max_draft_tokens + 1, verifier.context_length - context)
    by_rows = {rows: _spread(rows, max_rows) for rows in (*ROWS, *MORE_ROWS)}
    by_requests = {count: [1] * count for count in REQUESTS}
    batches = [counts for counts in (*by_rows.values(), *by_requests.values()) if len(counts) <= verifier.num_slots]
    needed = [by_rows[rows] for rows in ROWS]
    _fill(verifier, tokens, context, max(len(counts) for counts in batches))
    samples: dict[tuple[int, ...], list[float]] = {tuple(counts): [] for counts in batches}
    started = clock()
    for number in range(ROUNDS):
        is_needed = number == 0 or (number == 1 and not is_slow)  # twice, since a first time may be a slow one
        for counts in batches:
            if clock() - started < budget_seconds or (is_needed and counts in needed):
                samples[tuple(counts)].append(_pass_seconds(verifier, tokens, counts, context, clock))

    def medians(sizes: dict[int, list[int]]) -> dict[int, float]:
        measured = {size: samples.get(tuple(counts)) for size, counts in sorted(sizes.items())}
        return {size: float(np.median(seconds)) for size, seconds in measured.items() if seconds}

    return VerifySeconds(medians(by_rows), medians({1: [1]} | by_requests))


def _spread(rows: int, max_rows: int) -> list[int]:
    """Return rows per request: as few requests as hold `rows` with at most `max_rows` each, evenly."""
    count = -(-rows // max_rows)
    return [rows // count + (i < rows % count) for i in range(count)]


def _fill(verifier: Verifier, tokens: np.ndarray[tuple[int], np.dtype[np.int32]], context: int, num_slots: int) -> None:
    """Give the first `num_slots` slots `context` cached tokens."""
    if context:
        rules = SamplingRules(seed=0, temperature=0)
        verifier.verify([VerifyRequest(0, tokens[: context + 1], context + 1, 0, context, (), rules)])
        for slot in range(1, num_slots):
            verifier.copy_slot(0, slot, context)


def _pass_seconds(
    verifier: Verifier,
    tokens: np.ndarray[tuple[int], np.dtype[np.int32]],
    counts: list[int],
    context: int,
    clock: Callable[[], float],
) -> float:
    """Return the seconds of one pass over requests with `counts` rows each."""
    rules = SamplingRules(seed=0, temperature=0)
    requests = [
        VerifyRequest(
            slot, tokens[: context + 1], context + 1, context, 1, tokens[context + 1 : context + rows].tolist(), rules
        )
        for slot, rows in enumerate(counts)
    ]
    started = clock()
    verifier.verify(requests)
    return clock() - started
