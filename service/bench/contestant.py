"""What is compared: anything that continues a batch of prompts and says how long it took."""

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
        """Where it may differ: the reference's two tokens no more than so many nats apart. None: nowhere."""

    def takes(self, workload: Workload) -> bool:
        """Whether this workload makes sense for it; otherwise it is left out."""

    async def run(self, prompts: Sequence[Prompt], workload: Workload, pair: int, seed: int) -> Pass:
        """Continue all prompts at the same time; prompt `i` draws with `seed + i`."""

    async def margin(self, prompt: Prompt, mismatch: Mismatch, max_tokens: int) -> float | None:
        """Nats between the two tokens of a greedy mismatch, by this contestant's logits; None if it cannot tell."""
