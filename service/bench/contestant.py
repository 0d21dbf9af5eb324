"""The Contestant protocol: anything that continues a batch of prompts and is timed."""

from collections.abc import Sequence
from typing import Protocol

from service.bench.prompts import Prompt
from service.bench.records import Mismatch, Pass, Role, Workload


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def role(self) -> Role: ...

    @property
    def tolerated_margin(self) -> float | None:
        """Largest margin in nats, by the reference's logits, at which a differing token is excused. None: never."""

    def takes(self, workload: Workload) -> bool:
        """Return whether it takes part in this workload."""

    async def run(self, prompts: Sequence[Prompt], workload: Workload, pair: int, seed: int) -> Pass:
        """Continue all prompts at the same time. Prompt `i` draws with `seed + i`."""

    async def margin(self, prompt: Prompt, mismatch: Mismatch, max_tokens: int) -> float | None:
        """Return the nats between the two tokens of a greedy mismatch, by this contestant's logits; None if unknown."""
