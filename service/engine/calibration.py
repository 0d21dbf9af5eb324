"""What verification costs on this machine, measured once at start-up."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from verifiers.base import SamplingRules, Verifier, VerifyRequest

ROWS = (1, 64, 8, 2, 32, 4, 16)  # in order of worth: if time runs out, what is known spans the range
REQUESTS = (16, 4)  # the same, of plain passes
CONTEXT_TOKENS = 256  # what an ordinary request has behind it
SLOW_CONTEXT_TOKENS = 16  # of a model whose plain step takes long: it is dominated by its weights
SLOW_STEP_SECONDS = 0.05
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class VerifySeconds:
    """Seconds of verification passes: medians."""

    by_rows: dict[int, float]  # of as few requests as hold the rows
    by_requests: dict[int, float]  # of plain passes: one row for each request


def measure_verify_seconds(
    verifier: Verifier, max_draft_tokens: int, clock: Callable[[], float], budget_seconds: float = 1.4
) -> VerifySeconds:
    """Measure passes of several sizes for about `budget_seconds`, each request with an ordinary context.

    With drafts of at most `max_draft_tokens`. Only sizes that were reached in time (1 always is) and that the slots can
    hold are in the answer. Overwrites the verifier's slots.
    """
    started = clock()
    generator = np.random.default_rng(0)
    tokens = generator.integers(verifier.vocabulary_size, size=verifier.context_length, dtype=np.int32)
    _pass_seconds(verifier, tokens, [1], 0, clock)
    plain_seconds = _pass_seconds(verifier, tokens, [1], 0, clock)
    context = SLOW_CONTEXT_TOKENS if plain_seconds > SLOW_STEP_SECONDS else CONTEXT_TOKENS
    context = min(context, verifier.context_length // 2)
    most_rows = min(max_draft_tokens + 1, verifier.context_length - context)
    by_rows = {rows: _spread(rows, most_rows) for rows in ROWS}
    by_requests = {count: [1] * count for count in REQUESTS}
    batches = [counts for counts in (*by_rows.values(), *by_requests.values()) if len(counts) <= verifier.num_slots]
    _fill(verifier, tokens, context, max(len(counts) for counts in batches))
    samples: dict[tuple[int, ...], list[float]] = {tuple(counts): [] for counts in batches}
    for _ in range(ROUNDS):
        for counts in batches:
            if not samples[1,] or clock() - started < budget_seconds:
                samples[tuple(counts)].append(_pass_seconds(verifier, tokens, counts, context, clock))

    def medians(sizes: dict[int, list[int]]) -> dict[int, float]:
        measured = {size: samples.get(tuple(counts)) for size, counts in sorted(sizes.items())}
        return {size: float(np.median(seconds)) for size, seconds in measured.items() if seconds}

    return VerifySeconds(medians(by_rows), medians({1: [1]} | by_requests))


def _spread(rows: int, most: int) -> list[int]:
    """Rows per request: as few requests as hold `rows` with at most `most` each, evenly."""
    count = -(-rows // most)
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
    """Seconds of one pass over requests with `counts` rows each."""
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
