"""Compute figures from recorded passes. All functions are pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from service.bench.records import Acceptance, DraftedStep, Generation, Pass, Phases, WorkloadRecord

LOOPING_FROM = 0.3  # share of repeated 8-grams above which a continuation counts as looping
GRAM = 8  # tokens
POSITIONS_PER_POINT = 8  # generated tokens per point of the draft length over the output


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of `count` values."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Return the spread of `values`, or None if there are none."""
        if not values:
            return None
        lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, lower, upper, len(values))


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one contestant under one workload.

    A speed-up is the reference's seconds divided by its own, pair by pair.
    """

    contestant: str
    num_passes: int
    num_tokens: int
    seconds: float
    speed_up: Spread | None  # of whole requests, including prompt reading; None for the reference itself
    decode_speed_up: Spread | None  # after the first tokens
    total_speed_up: float | None  # all seconds of the reference divided by all seconds of this one
    free_speed_up: Spread | None  # over the fastest contestant that drafts without a model
    looping_speed_up: Spread | None  # of requests whose continuation loops; only at concurrency 1
    other_speed_up: Spread | None  # of the other requests
    first_token_seconds: float | None  # median
    token_seconds: float | None  # median over requests of the time per token after the first
    longest_gap_seconds: float | None  # median over requests of the longest wait between two pieces
    acceptance: Acceptance
    looping_acceptance: Acceptance
    other_acceptance: Acceptance
    drafted_by_position: tuple[int, ...]  # drafts that have a token at each position
    accepted_by_position: tuple[int, ...]
    draft_lengths: tuple[int, ...]  # steps by draft length from 0
    draft_length_over_output: tuple[float, ...]  # mean draft tokens per step, by POSITIONS_PER_POINT output positions
    sources: dict[str, float]  # shares of the steps by draft source
    phases: Phases | None
    search_share: float | None  # the search's share of the seconds of steps with a diffusion pass
    num_mismatches: int  # continuations that differ from the reference's
    num_near_ties: int  # continuations that differ but are excused

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def repeated_share(tokens: Sequence[int]) -> float:
    """Return the share of 8-grams that occur earlier in `tokens`; 0 if there are none."""
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_looping(generation: Generation) -> bool:
    return repeated_share(generation.tokens) > LOOPING_FROM


def looping_share(record: WorkloadRecord) -> float:
    """Return the share of the reference's continuations that loop. The others' continuations are the same."""
    generations = [generation for entry in record.of(record.reference) for generation in entry.generations]
    return sum(map(is_looping, generations)) / len(generations) if generations else 0.0


def summarize(record: WorkloadRecord) -> list[Summary]:
    """Return one summary per contestant, in order of first appearance."""
    names = dict.fromkeys(entry.contestant for entry in record.passes)
    fastest_free = min(record.free, key=lambda name: sum(entry.seconds for entry in record.of(name)), default=None)
    return [_summary(record, name, fastest_free) for name in names]


def _summary(record: WorkloadRecord, contestant: str, fastest_free: str | None) -> Summary:
    passes = record.of(contestant)
    generations = [generation for entry in passes for generation in entry.generations]
    steps = [step for generation in generations for step in generation.steps]
    looping = [generation for generation in generations if is_looping(generation)]
    others = [generation for generation in generations if not is_looping(generation)]
    pairs = _pairs(record, record.reference, contestant)
    free_pairs = (
        [] if fastest_free is None or contestant == record.reference else _pairs(record, fastest_free, contestant)
    )
    single = [pair for pair in pairs if record.workload.concurrency == 1]
    drafted, accepted = _by_position(steps)
    phases = [entry.phases for entry in passes if entry.phases is not None]
    total_phases = _sum_phases(phases) if phases else None
    diffusion_seconds = sum(entry.diffusion_step_seconds for entry in passes)
    return Summary(
        contestant=contestant,
        num_passes=len(passes),
        num_tokens=sum(entry.num_tokens for entry in passes),
        seconds=sum(entry.seconds for entry in passes),
        speed_up=Spread.of([r.seconds / o.seconds for r, o in pairs]),
        decode_speed_up=Spread.of([r.decode_seconds / o.decode_seconds for r, o in pairs if o.decode_seconds > 0]),
        total_speed_up=sum(r.seconds for r, _ in pairs) / sum(o.seconds for _, o in pairs) if pairs else None,
        free_speed_up=Spread.of([r.seconds / o.seconds for r, o in free_pairs]),
        looping_speed_up=Spread.of([r.seconds / o.seconds for r, o in single if is_looping(r.generations[0])]),
        other_speed_up=Spread.of([r.seconds / o.seconds for r, o in single if not is_looping(r.generations[0])]),
        first_token_seconds=_median([generation.first_token_seconds for generation in generations]),
        token_seconds=_median([_token_seconds(generation) for generation in generations if len(generation.tokens) > 1]),
        longest_gap_seconds=_median([_longest_gap(generation) for generation in generations]),
        acceptance=Acceptance.sum(entry.acceptance for entry in generations),
        looping_acceptance=Acceptance.sum(entry.acceptance for entry in looping),
        other_acceptance=Acceptance.sum(entry.acceptance for entry in others),
        drafted_by_position=drafted,
        accepted_by_position=accepted,
        draft_lengths=_histogram([step.num_drafted for step in steps]),
        draft_length_over_output=_draft_length_over_output(generations),
        sources=_shares([step.source for step in steps]),
        phases=total_phases,
        search_share=total_phases.search / diffusion_seconds if total_phases and diffusion_seconds > 0 else None,
        num_mismatches=sum(not entry.is_near_tie for entry in record.mismatches if entry.contestant == contestant),
        num_near_ties=sum(entry.is_near_tie for entry in record.mismatches if entry.contestant == contestant),
    )


def _pairs(record: WorkloadRecord, baseline: str, contestant: str) -> list[tuple[Pass, Pass]]:
    """Return (baseline, contestant) passes of every pair; empty for the baseline itself."""
    if contestant == baseline:
        return []
    known = {entry.pair: entry for entry in record.of(baseline)}
    return [(known[entry.pair], entry) for entry in record.of(contestant)]


def _token_seconds(generation: Generation) -> float:
    return (generation.delta_seconds[-1] - generation.delta_seconds[0]) / (len(generation.tokens) - 1)


def _longest_gap(generation: Generation) -> float:
    return max(np.diff(generation.delta_seconds).tolist(), default=0.0)


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _by_position(steps: Sequence[DraftedStep]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    longest = max((step.num_drafted for step in steps), default=0)
    drafted = tuple(sum(step.num_drafted > at for step in steps) for at in range(longest))
    accepted = tuple(sum(step.num_accepted > at for step in steps) for at in range(longest))
    return drafted, accepted


def _histogram(values: Sequence[int]) -> tuple[int, ...]:
    counts = Counter(values)
    return tuple(counts[value] for value in range(max(counts, default=-1) + 1))


def _draft_length_over_output(generations: Sequence[Generation]) -> tuple[float, ...]:
    points: dict[int, list[int]] = {}
    for generation in generations:
        position = 1  # the first token comes from the step that reads the prompt
        for step in generation.steps:
            points.setdefault(position // POSITIONS_PER_POINT, []).append(step.num_drafted)
            position += step.num_accepted + 1
    return tuple(float(np.mean(points.get(at, [0]))) for at in range(max(points, default=-1) + 1))


Value = TypeVar("Value", bound=str)


def _shares(values: Sequence[Value]) -> dict[str, float]:
    return {value: count / len(values) for value, count in sorted(Counter(values).items())}


def _sum_phases(phases: Sequence[Phases]) -> Phases:
    return Phases(*(sum(getattr(entry, field.name) for entry in phases) for field in fields(Phases)))
