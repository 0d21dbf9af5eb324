"""What verification costs on this machine, measured once at start-up."""

from collections.abc import Callable

import numpy as np

from verifiers.base import SamplingRules, Verifier, VerifyRequest

ROWS = (1, 64, 8, 2, 32, 4, 16)  # in order of worth: if time runs out, what is known spans the range
CONTEXT_TOKENS = 256  # what an ordinary request has behind it
SLOW_CONTEXT_TOKENS = 16  # of a model whose plain step takes long: it is dominated by its weights
SLOW_STEP_SECONDS = 0.05
ROUNDS = 7


def measure_verify_seconds(
    verifier: Verifier, max_draft_tokens: int, clock: Callable[[], float], budget_seconds: float = 1.2
) -> dict[int, float]:
    """Seconds of a verification pass by its rows: the median over rounds that fit into `budget_seconds`.

    The rows belong to as few requests as hold them with drafts of at most `max_draft_tokens`, each with an ordinary
    context. Only row counts that were reached in time (1 always is) and that the slots can hold are in the answer.
    Overwrites the verifier's slots.
    """
    started = clock()
    generator = np.random.default_rng(0)
    tokens = generator.integers(verifier.vocabulary_size, size=verifier.context_length, dtype=np.int32)
    _pass_seconds(verifier, tokens, [1], 0, clock)
    plain_seconds = _pass_seconds(verifier, tokens, [1], 0, clock)
    context = SLOW_CONTEXT_TOKENS if plain_seconds > SLOW_STEP_SECONDS else CONTEXT_TOKENS
    context = min(context, verifier.context_length // 2)
    most_rows = min(max_draft_tokens + 1, verifier.context_length - context)
    batches = {rows: _spread(rows, most_rows) for rows in ROWS}
    batches = {rows: counts for rows, counts in batches.items() if len(counts) <= verifier.num_slots}
    _fill(verifier, tokens, context, max(len(counts) for counts in batches.values()))
    samples: dict[int, list[float]] = {rows: [] for rows in batches}
    for _ in range(ROUNDS):
        for rows, counts in batches.items():
            if not samples[1] or clock() - started < budget_seconds:
                samples[rows].append(_pass_seconds(verifier, tokens, counts, context, clock))
    return {rows: float(np.median(seconds)) for rows, seconds in sorted(samples.items()) if seconds}


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
