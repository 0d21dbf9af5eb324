"""A drafter that fails on demand: real weights, real passes, and a planted fault after them."""

import threading
from typing import Any, Literal

import torch
from torch import Tensor

from transformer.model import Transformer

Fault = Literal["none", "raises", "nan", "stalls"]


class FaultyTransformer(Transformer):
    """A drafter's model whose passes fail as `fault` says. `release` ends a stall; so does `max_stall`."""

    max_stall = 20.0  # seconds

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fault: Fault = "none"
        self.num_faults = 0
        self._released = threading.Event()
        self.release = self._released.set

    def plant(self, fault: Fault) -> None:
        """Fail in this way from the next pass on."""
        self._released.clear()
        self.fault = fault

    @torch.inference_mode()
    def logits(self, hidden: Tensor, num_tokens: int | None = None) -> Tensor:
        logits = super().logits(hidden, num_tokens)
        if self.fault == "none":
            return logits
        self.num_faults += 1
        if self.fault == "raises":
            raise RuntimeError("a planted failure")
        if self.fault == "stalls":
            self._released.wait(self.max_stall)
            return logits
        return torch.full_like(logits, torch.nan)
