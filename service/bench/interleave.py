"""Measure contestants in turns over the same prompts, so that whatever slows the machine slows all of them."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from service.bench.contestant import Contestant
from service.bench.prompts import Prompt
from service.bench.records import Mismatch, Pass, Workload, WorkloadRecord, find_mismatches

SEEDS_PER_PAIR = 4096  # more than the prompts of a batch
Batch = tuple[Prompt, ...]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One workload with its prompts."""

    workload: Workload
    batches: Sequence[Batch]  # measured; each gives one pair
    warm_up: Sequence[Batch]  # run by everyone before the measurement, not counted


async def measure(
    contestants: Sequence[Contestant], task: Task, seed: int, deadline: float, clock: Callable[[], float], say: Say
) -> WorkloadRecord:
    """Run every batch with every contestant, one after the other, in an order that rotates from pair to pair.

    Stop before a pair that would not end by `deadline` (of `clock`), judged by the slowest so far. At least one runs.
    """
    workload = task.workload
    taking_part = [contestant for contestant in contestants if contestant.takes(workload)]
    reference = next(contestant for contestant in taking_part if contestant.role == "reference")
    free = tuple(contestant.name for contestant in taking_part if contestant.role == "free")
    passes: list[Pass] = []
    mismatches: list[Mismatch] = []
    for number, batch in enumerate(task.warm_up):
        for contestant in taking_part:
            say(f"{workload.title}: warming up {contestant.name}")
            await contestant.run(batch, workload, -1 - number, _seed(seed, -1 - number))
    longest = 0.0
    for pair, batch in enumerate(task.batches):
        started = clock()
        if pair and started + longest > deadline:
            break
        taken: dict[str, Pass] = {}
        for contestant in rotated(taking_part, pair):
            say(f"{workload.title}: {pair + 1} of {len(task.batches)}, {contestant.name}")
            gc.collect()  # so that no contestant pays for another's garbage
            taken[contestant.name] = await contestant.run(batch, workload, pair, _seed(seed, pair))
        for contestant in taking_part:
            passes.append(taken[contestant.name])
            if contestant is not reference:
                found = find_mismatches(taken[reference.name], taken[contestant.name])
                mismatches += [await _with_margin(reference, contestant, batch, workload, entry) for entry in found]
        longest = max(longest, clock() - started)
    return WorkloadRecord(workload, reference.name, free, tuple(passes), tuple(mismatches), len(task.batches))


def rotated(contestants: Sequence[Contestant], pair: int) -> list[Contestant]:
    """Return the contestants in this pair's order. Each comes first, and last, equally often."""
    start = pair % len(contestants)
    return [*contestants[start:], *contestants[:start]]


def _seed(seed: int, pair: int) -> int:
    return (seed + pair * SEEDS_PER_PAIR) % (1 << 63)


async def _with_margin(
    reference: Contestant, contestant: Contestant, batch: Batch, workload: Workload, mismatch: Mismatch
) -> Mismatch:
    """Add how close the two tokens were, and whether that excuses the difference."""
    if workload.temperature > 0:
        return mismatch
    prompt = next(prompt for prompt in batch if prompt.name == mismatch.prompt)
    margin = await reference.margin(prompt, mismatch, workload.max_tokens)
    tolerated = contestant.tolerated_margin
    is_near_tie = margin is not None and tolerated is not None and margin <= tolerated
    return replace(mismatch, margin=margin, is_near_tie=is_near_tie)
