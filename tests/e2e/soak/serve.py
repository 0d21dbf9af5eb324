"""Run `diffuspec serve` with a drafter that can be made to fail: SIGUSR1 plants the next fault for a while."""

import itertools
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from service import cli, wiring
from service.settings import Settings
from tests.faulty import FaultyTransformer

FAULT_SECONDS = 2.0


def main() -> int:
    faults = itertools.cycle(("raises", "nan"))
    drafters: list[FaultyTransformer] = []

    def load_drafter(settings: Settings, load_model: Any) -> FaultyTransformer:
        drafters.append(FaultyTransformer.load(Path(settings.model.drafter_choice)))
        return drafters[-1]

    def plant(*_: object) -> None:
        for drafter in drafters:
            drafter.plant(next(faults))  # type: ignore[arg-type]
            threading.Timer(FAULT_SECONDS, drafter.plant, ["none"]).start()

    wiring._load_drafter = load_drafter
    signal.signal(signal.SIGUSR1, plant)
    return cli.main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
