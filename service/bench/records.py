"""What one run of the benchmark writes down: passes of contestants over the same batches of prompts."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from drafters.base import SourceName

Role = Literal["reference", "free", "other"]
"""`reference`: plain decoding, which the others are compared with. `free`: drafts without a model."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What every contestant is asked for."""

    concurrency: int  # prompts at the same time: the size of a batch
    temperature: float
    max_tokens: int  # generated for every prompt; end tokens don't end it

    @property
    def title(self) -> str:
        drawn = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{drawn}, concurrency {self.concurrency}"


@dataclass(frozen=True, slots=True)
class DraftedStep:
    """One verification of one request, after its prompt was read."""

    source: SourceName
    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What became of the drafts of some requests; steps that read a prompt don't count."""

    num_steps: int = 0
    num_drafted_steps: int = 0
    num_drafted: int = 0  # tokens
    num_accepted: int = 0  # tokens, without the extra one of every step

    @property
    def length(self) -> float | None:
        """Tokens per step, the extra one included: 1 is plain decoding."""
        return 1 + self.num_accepted / self.num_steps if self.num_steps else None

    @property
    def length_when_drafted(self) -> float | None:
        """The same over the steps that had a draft."""
        return 1 + self.num_accepted / self.num_drafted_steps if self.num_drafted_steps else None

    @property
    def rate(self) -> float | None:
        """Accepted share of the drafted tokens."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @classmethod
    def of(cls, steps: Iterable[DraftedStep]) -> "Acceptance":
        return cls.sum(cls(1, int(step.num_drafted > 0), step.num_drafted, step.num_accepted) for step in steps)

    @classmethod
    def sum(cls, parts: Iterable["Acceptance"]) -> "Acceptance":
        parts = list(parts)
        return cls(*(sum(getattr(part, field.name) for part in parts) for field in fields(cls)))


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt's continuation by one contestant. Seconds count from when its batch was submitted."""

    prompt: str  # its name
    tokens: tuple[int, ...]
    delta_seconds: tuple[float, ...]  # when each piece arrived; a piece holds one or more tokens
    steps: tuple[DraftedStep, ...] = ()  # empty where the contestant doesn't tell
    reported: Acceptance | None = None  # of a contestant that tells totals only

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.of(self.steps) if self.reported is None else self.reported

    @property
    def first_token_seconds(self) -> float:
        return self.delta_seconds[0]


@dataclass(frozen=True, slots=True)
class Phases:
    """Where the seconds of a pass went."""

    prompt: float = 0.0  # verification passes that carried prompt tokens
    draft: float = 0.0  # drafter passes, the free draft, and weighing what is worth it
    search: float = 0.0
    verify: float = 0.0
    commit: float = 0.0
    other: float = 0.0  # scheduling, handing tokens over, bookkeeping

    @property
    def total(self) -> float:
        return self.prompt + self.draft + self.search + self.verify + self.commit + self.other


@dataclass(frozen=True, slots=True)
class Pass:
    """One contestant over one batch."""

    contestant: str
    pair: int  # passes of the same pair stood next to each other in time and had the same prompts
    seconds: float  # from submission to the last token
    generations: tuple[Generation, ...]
    phases: Phases | None = None
    diffusion_step_seconds: float = 0.0  # in all phases of the steps that had a diffusion pass

    @property
    def decode_seconds(self) -> float:
        """From the moment every request had its first token to the last token."""
        return self.seconds - max(generation.first_token_seconds for generation in self.generations)

    @property
    def num_tokens(self) -> int:
        return sum(len(generation.tokens) for generation in self.generations)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A continuation that differs from plain decoding's: a failure of the promise to be lossless."""

    contestant: str
    pair: int
    prompt: str
    position: int  # of the first token that differs
    expected: int | None  # plain decoding's token there; None: it had ended
    found: int | None
    margin: float | None = None  # nats between the two by plain decoding's own logits; None: not known
    is_near_tie: bool = False  # close enough for another implementation to round it the other way


@dataclass(frozen=True, slots=True)
class WorkloadRecord:
    """Everything that was measured of one workload."""

    workload: Workload
    reference: str  # the contestant that the others are compared with
    free: tuple[str, ...]  # contestants that draft without a model: what a drafter has to beat
    passes: tuple[Pass, ...]
    mismatches: tuple[Mismatch, ...]
    num_pairs_planned: int

    @property
    def num_pairs(self) -> int:
        return len({entry.pair for entry in self.passes})

    def of(self, contestant: str) -> list[Pass]:
        """The passes of one contestant, by pair."""
        return [entry for entry in self.passes if entry.contestant == contestant]


def first_difference(expected: tuple[int, ...], found: tuple[int, ...]) -> int | None:
    """Position of the first token in which two continuations differ; None if they are equal."""
    for position, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            return position
    return None if len(expected) == len(found) else min(len(expected), len(found))


def find_mismatches(reference: Pass, other: Pass) -> list[Mismatch]:
    """The continuations of `other` that are not those of `reference`, a pass over the same prompts."""
    found = []
    for ours, theirs in zip(reference.generations, other.generations, strict=True):
        position = first_difference(ours.tokens, theirs.tokens)
        if position is not None:
            expected = ours.tokens[position] if position < len(ours.tokens) else None
            actual = theirs.tokens[position] if position < len(theirs.tokens) else None
            found.append(Mismatch(other.contestant, other.pair, ours.prompt, position, expected, actual))
    return found
