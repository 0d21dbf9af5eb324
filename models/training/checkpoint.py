"""Training state on disk, so that a stopped run can continue."""

from collections.abc import Sequence
from pathlib import Path

import torch


class Checkpoint:
    """One file with a model, its optimizers and the number of finished steps."""

    def __init__(self, path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._path, self._model, self._optimizers = path, model, optimizers

    def load(self) -> int:
        """Restore the state and return its step; 0 if nothing was saved."""
        if not self._path.exists():
            return 0
        state = torch.load(self._path, weights_only=True)
        self._model.load_state_dict(state["model"])
        for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        return int(state["step"])

    def save(self, step: int) -> None:
        """Replace the file in one move, so that a stop while writing loses nothing."""
        state = {
            "model": self._model.state_dict(),
            "optimizers": [o.state_dict() for o in self._optimizers],
            "step": step,
        }
        new = self._path.with_suffix(".new")
        torch.save(state, new)
        new.replace(self._path)
