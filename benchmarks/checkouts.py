"""Compares this checkout with another one: the speed-ups of `diffuspec bench`, in turns, side by side.

    git worktree add ../before SOME_COMMIT
    python -m benchmarks.checkouts ../before --turns 3 --bench "--cells plain,default --concurrency 1,4 --threads 1"

Both checkouts run in this environment, one after the other in every turn. A cell's speed-up is over the plain decoding
of its own run, so that a machine whose speed drifts favours neither.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent

Cell = tuple[float, int, str]
"""Temperature, concurrency, name."""


def measure(checkout: Path, arguments: Sequence[str]) -> Mapping[Cell, float]:
    """Run the checkout's `bench`; return the total speed-up of every cell over plain decoding."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [sys.executable, "-m", "service.cli", "bench", *arguments, "--json", str(report)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        workloads = json.loads(report.read_text())["workloads"]
    return {
        (workload["temperature"], workload["concurrency"], summary["contestant"]): summary["total_speed_up"]
        for workload in workloads
        for summary in workload["summaries"]
        if summary["total_speed_up"] is not None
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bench", default="", help="arguments of `diffuspec bench`, in one text")
    arguments = parser.parse_args(argv)
    speed_ups: dict[Path, defaultdict[Cell, list[float]]] = {
        checkout: defaultdict(list) for checkout in (arguments.other.resolve(), HERE)
    }
    for turn in range(arguments.turns):
        for checkout, found in speed_ups.items():
            print(f"turn {turn + 1} of {arguments.turns}: {checkout.name}", file=sys.stderr, flush=True)
            for cell, speed_up in measure(checkout, shlex.split(arguments.bench)).items():
                found[cell].append(speed_up)
    others, ours = speed_ups.values()
    ratios = []
    print(f"{'temperature':>11} {'requests':>8}  {'cell':<14} {'other':>7} {'this':>7} {'this / other':>13}")
    for cell in sorted(set(others) & set(ours)):
        other, own = statistics.median(others[cell]), statistics.median(ours[cell])
        ratios.append(own / other)
        temperature, concurrency, name = cell
        print(f"{temperature:>11g} {concurrency:>8}  {name:<14} {other:>7.2f} {own:>7.2f} {own / other:>13.3f}")
    if ratios:
        print(f"{len(ratios)} cells: mean ratio {statistics.mean(ratios):.3f}, lowest {min(ratios):.3f}")


if __name__ == "__main__":
    main()
