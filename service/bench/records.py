"""Records of one benchmark run: passes of contestants over the same batches of prompts."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from drafters.base import SourceName, num_common

Role = Literal["reference", "free", "other"]
"""`reference`: plain decoding, which the others are compared with. `free`: drafts without a model."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The task of every contestant."""

    concurrency: int  # concurrent prompts: the size of a batch
    temperature: float
    max_tokens: int  # generated per prompt; end tokens don't end it

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
    """Counts of drafted and accepted tokens, over steps that don't read a prompt."""

    num_steps: int = 0
    num_drafted_steps: int = 0
    num_drafted: int = 0  # tokens
    num_accepted: int = 0  # tokens, without the extra one per step

    @property
    def length(self) -> float | None:
        """Tokens per step, including the extra one. Plain decoding has 1."""
        return 1 + self.num_accepted / self.num_steps if self.num_steps else None

    @property
    def length_when_drafted(self) -> float | None:
        """Tokens per step that had a draft, including the extra one."""
        return 1 + self.num_accepted / self.num_drafted_steps if self.num_drafted_steps else None

    @property
    def rate(self) -> float | None:
        """Accepted share of the drafted tokens."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @classmethod
    def of(cls, steps: Iterable[DraftedStep]) -> "Acceptance":
        return cls.sum(cls(1, int(step.num_drafted > 0), step.num_drafted, step.num_accepted) for step in steps)

    @classmethod
    def sum(cls, counts: Iterable["Acceptance"]) -> "Acceptance":
        counts = list(counts)
        return cls(*(sum(getattr(each, field.name) for each in counts) for field in fields(cls)))


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt's continuation by one contestant. Seconds count from the submission of its batch."""

    prompt: str  # its name
    tokens: tuple[int, ...]
    delta_seconds: tuple[float, ...]  # when each piece arrived; a piece holds one or more tokens
    steps: tuple[DraftedStep, ...] = ()  # empty if the contestant doesn't report steps
    reported: Acceptance | None = None  # by a contestant that reports totals only

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.of(self.steps) if self.reported is None else self.reported

    @property
    def first_token_seconds(self) -> float:
        return self.delta_seconds[0]


@dataclass(frozen=True, slots=True)
class Phases:
    """The seconds of a pass by phase."""

    prompt: float = 0.0  # verification passes with prompt tokens
    draft: float = 0.0  # drafter passes, the free draft and the policy
    search: float = 0.0
    verify: float = 0.0
    commit: float = 0.0
    other: float = 0.0  # scheduling, delivering tokens, bookkeeping

    @property
    def total(self) -> float:
        return self.prompt + self.draft + self.search + self.verify + self.commit + self.other


@dataclass(frozen=True, slots=True)
class Pass:
    """One contestant's run over one batch."""

    contestant: str
    pair: int  # passes of the same pair ran one after the other, over the same prompts
    seconds: float  # from submission to the last token
    generations: tuple[Generation, ...]
    phases: Phases | None = None
    diffusion_step_seconds: float = 0.0  # all phases of the steps with a diffusion pass

    @property
    def decode_seconds(self) -> float:
        """Seconds from the moment when every request had its first token to the last token."""
        return self.seconds - max(generation.first_token_seconds for generation in self.generations)

    @property
    def num_tokens(self) -> int:
        return sum(len(generation.tokens) for generation in self.generations)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A continuation that differs from plain decoding's, which breaks the promise to be lossless."""

    contestant: str
    pair: int
    prompt: str
    position: int  # of the first token that differs
    expected: int | None  # plain decoding's token at the position; None: it ended before
    found: int | None
    margin: float | None = None  # nats between the two tokens by plain decoding's logits; None: unknown
    is_near_tie: bool = False  # so close that another implementation may round it the other way


@dataclass(frozen=True, slots=True)
class WorkloadRecord:
    """All measurements of one workload."""

    workload: Workload
    reference: str  # the contestant that the others are compared with
    free: tuple[str, ...]  # contestants that draft without a model, which a drafter has to beat
    passes: tuple[Pass, ...]
    mismatches: tuple[Mismatch, ...]
    num_pairs_planned: int

    @property
    def num_pairs(self) -> int:
        return len({entry.pair for entry in self.passes})

    def of(self, contestant: str) -> list[Pass]:
        """Return the passes of one contestant, in the order of pairs."""
        return [entry for entry in self.passes if entry.contestant == contestant]


def first_difference(expected: tuple[int, ...], found: tuple[int, ...]) -> int | None:
    """Return the position of the first token at which two continuations differ; None if they are equal."""
    position = num_common(expected, found)
    return None if position == len(expected) == len(found) else position


def find_mismatches(reference: Pass, other: Pass) -> list[Mismatch]:
    """Return the continuations of `other` that differ from those of `reference`, a pass over the same prompts."""
    found = []
    for ours, theirs in zip(reference.generations, other.generations, strict=True):
        position = first_difference(ours.tokens, theirs.tokens)
        if position is not None:
            expected = ours.tokens[position] if position < len(ours.tokens) else None
            actual = theirs.tokens[position] if position < len(theirs.tokens) else None
            found.append(Mismatch(other.contestant, other.pair, ours.prompt, position, expected, actual))
    return found
