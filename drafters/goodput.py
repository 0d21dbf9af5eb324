"""The default length policy: draft what is worth its cost, which may be nothing.

Every step it maximises expected committed tokens per second over the whole batch,

    sum over requests of (1 + expected accepted)  /  (verification + diffusion pass + search + overhead) seconds,

from two things that are measured while serving: how often a draft token of a given confidence is accepted
(`drafters.estimates`), and what a pass of so many rows costs (`drafters.costs`). The decision has two parts.
`choose_sources` runs BEFORE drafting and says which requests are worth a diffusion pass; `choose_lengths` runs after
it, when the drafts and their confidences are known, and says how much of each is worth verifying. A useless drafter or
a full batch ends at no draft at all.
"""

import numpy as np
from numpy.typing import NDArray

from drafters.costs import KNOT_ROWS, BatchCosts, seconds_at
from transformer.compiled import allocating

Floats = NDArray[np.float64]

HYSTERESIS = 0.02  # a draft must promise this much more than none: the estimates are noisy, plain decoding is not
BATCH_HYSTERESIS = 0.02  # more for every further request, up to ...
MAX_HYSTERESIS = 0.25  # ... this: who is drafted for ends early, and leaves the others passes that are less full
PASS_HYSTERESIS = 0.08  # the same for a diffusion pass, which is paid for before its draft is seen
MAX_SWEEPS = 3


@allocating
def _best_lengths(
    accepted: Floats,
    caps: NDArray[np.int64],
    base_rows: float,
    base_seconds: float,
    knots: Floats,
    verify: Floats,
    margin: float,
) -> tuple[NDArray[np.int64], float, float]:
    """Lengths that maximise tokens per second: coordinate ascent over requests, Dinkelbach's method for the ratio.

    accepted: [requests, 1 + longest] expected accepted tokens by length; 0 at length 0.
    Returns the lengths, the expected tokens and the seconds of the step.
    """
    count = accepted.shape[0]
    lengths = np.zeros(count, dtype=np.int64)
    rows = base_rows
    tokens = float(count)
    total = base_seconds + seconds_at(rows, knots, verify)
    rate = tokens / total
    for _ in range(MAX_SWEEPS):
        changed = False
        for i in range(count):
            others = rows - lengths[i]
            floor = seconds_at(others, knots, verify)
            best, best_value = 0, 0.0
            for length in range(1, caps[i] + 1):
                cost = seconds_at(others + length, knots, verify) - floor
                value = accepted[i, length] - rate * cost * (1.0 + margin) - margin
                if value > best_value:
                    best, best_value = length, value
            if best != lengths[i]:
                tokens += accepted[i, best] - accepted[i, lengths[i]]
                rows = others + best
                lengths[i] = best
                changed = True
        total = base_seconds + seconds_at(rows, knots, verify)
        rate = tokens / total
        if not changed:
            break
    return lengths, tokens, total


@allocating
def _best_sources(
    copied: Floats,
    diffused: Floats,
    caps: NDArray[np.int64],
    draft_rows: Floats,
    base_rows: float,
    overhead: float,
    search_seconds: float,
    knots: Floats,
    verify: Floats,
    draft: Floats,
    margin: float,
    pass_margin: float,
) -> NDArray[np.bool_]:
    """Which requests should have a diffusion pass: start with all, drop those that gain least, keep the best rate.

    copied, diffused: [requests, 1 + longest] expected accepted tokens by length, without and with a diffusion pass.
    draft_rows: [requests] rows that each adds to the pass.
    """
    count = copied.shape[0]
    _, tokens, total = _best_lengths(copied, caps, base_rows, overhead, knots, verify, margin)
    best_rate = tokens / total * (1.0 + pass_margin)
    chosen = np.zeros(count, dtype=np.bool_)
    gains = np.empty(count)
    for i in range(count):
        gains[i] = (diffused[i, : caps[i] + 1].max() - copied[i, : caps[i] + 1].max()) / (1.0 + draft_rows[i])
    order = np.argsort(-gains)
    size = count
    mixed = copied.copy()
    while size > 0:
        mixed[:] = copied
        pass_rows = 0.0
        for at in range(size):
            i = order[at]
            mixed[i] = diffused[i]
            pass_rows += draft_rows[i]
        seconds = overhead + seconds_at(pass_rows, knots, draft) + search_seconds * size
        _, tokens, total = _best_lengths(mixed, caps, base_rows, seconds, knots, verify, margin)
        if tokens / total > best_rate:
            best_rate = tokens / total
            chosen[:] = False
            for at in range(size):
                chosen[order[at]] = True
        size //= 2
    return chosen


def choose_sources(
    copied: Floats, diffused: Floats, caps: NDArray[np.int64], draft_rows: Floats, costs: BatchCosts
) -> NDArray[np.bool_]:
    """Before drafting: which requests of the batch are worth a diffusion pass (shapes as in `_best_sources`)."""
    chosen: NDArray[np.bool_] = _best_sources(
        copied,
        diffused,
        caps,
        draft_rows,
        float(costs.base_rows),
        costs.overhead_seconds,
        costs.search_seconds,
        KNOT_ROWS,
        costs.verify,
        costs.draft,
        hysteresis(len(caps)),
        PASS_HYSTERESIS,
    )
    return chosen


def choose_lengths(
    accepted: Floats, caps: NDArray[np.int64], other_rows: int, spent_seconds: float, costs: BatchCosts
) -> NDArray[np.int64]:
    """After drafting: how many tokens of each draft to verify, with `spent_seconds` on drafting already paid.

    other_rows: of drafts whose length has been settled otherwise.
    """
    lengths: NDArray[np.int64]
    lengths, tokens, seconds = _best_lengths(
        accepted,
        caps,
        float(costs.base_rows + other_rows),
        costs.overhead_seconds + spent_seconds,
        KNOT_ROWS,
        costs.verify,
        hysteresis(len(caps)),
    )
    plain_seconds = costs.verify_at(costs.base_rows + other_rows) if other_rows else costs.plain_seconds
    without_drafts = len(lengths) / (costs.overhead_seconds + spent_seconds + plain_seconds)
    if tokens / seconds < without_drafts * (1.0 + hysteresis(len(caps))):
        lengths[:] = 0
    return lengths


def hysteresis(num_requests: int) -> float:
    """How much more than none drafts must promise in a batch of so many requests."""
    return min(HYSTERESIS + BATCH_HYSTERESIS * (num_requests - 1), MAX_HYSTERESIS)
