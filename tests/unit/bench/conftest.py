"""Contestants over tiny checkpoints: the real engine, the real drafters."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from service.bench.cells import choose_cells
from service.bench.embedded import EmbeddedContestant
from service.bench.loading import embedded_contestants, load
from service.bench.prompts import Prompt
from service.settings import Settings, load_settings
from tests.checkpoints import write_checkpoint

SLOTS = 3
Start = Callable[..., AbstractAsyncContextManager[list[EmbeddedContestant]]]


@pytest.fixture(scope="session")
def other_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with other weights, so its output differs."""
    folder = tmp_path_factory.mktemp("other-target")
    write_checkpoint(folder, "llama", seed=5)
    return folder


@pytest.fixture
def settings(tiny_target: Path, tiny_drafter: Path) -> Settings:
    return load_settings(None, {"model.target": str(tiny_target), "model.drafter": str(tiny_drafter)})


@pytest.fixture
def start(settings: Settings) -> Start:
    """Start the engines of the named cells; `target` replaces the settings' target."""

    @asynccontextmanager
    async def started(*names: str, target: Path | None = None) -> AsyncIterator[list[EmbeddedContestant]]:
        changed = settings
        if target is not None:
            changed = settings.model_copy(update={"model": settings.model.model_copy(update={"target": target})})
        cells = choose_cells(names, False, True)
        loaded = load(changed, cells, SLOTS)
        async with embedded_contestants(loaded, cells) as contestants:
            yield contestants

    return started


@pytest.fixture
def prompts() -> list[Prompt]:
    """Prompts of different lengths. The first repeats itself, so that there is something to copy."""
    return [
        Prompt("repeating", tuple(range(60, 72)) * 4),
        Prompt("short", (10, 20, 30)),
        Prompt("long", tuple((7 * i + i * i) % 250 for i in range(90))),
    ]
