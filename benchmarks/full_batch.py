"""Measure tokens per second while the batch is full, with drafts and without.

    python -m benchmarks.full_batch --places 1,4,16,32 --temperatures 0,1.2

There are as many clients as places in the batch, and each sends its next prompt when its last one is answered. (The
batches of `diffuspec bench --concurrency` run empty towards their end.) The engines share the weights and take turns.
They learn in the first turn, which does not count.
"""

import argparse
import asyncio
import functools
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.decoding import held_out_prompts, start_engine
from service.bench.cells import Cell, build, find_cell
from service.bench.environment import describe_environment
from service.bench.loading import Loaded, load
from service.bench.prompts import Prompt
from service.engine.base import GenerationRequest
from service.engine.embedded import EmbeddedEngine
from service.settings import load_settings
from verifiers.base import SamplingRules

FULL_SHARE = 0.75  # of a turn; after that, clients run out of prompts
PROMPT_TOKENS, NEW_TOKENS = 96, 96
PROMPTS_PER_PLACE = 6


async def tokens_per_second(
    engine: EmbeddedEngine, prompts: Sequence[Prompt], places: int, temperature: float, turn: int
) -> float:
    numbers = iter(range(len(prompts)))
    arrived: list[tuple[float, int]] = []
    started = time.perf_counter()

    async def client() -> None:
        for number in numbers:
            rules = SamplingRules(number, temperature=temperature)
            request = GenerationRequest(f"{turn}-{number}", prompts[number].tokens, NEW_TOKENS, rules)
            async for delta in engine.generate(request):
                arrived.append((time.perf_counter() - started, len(delta.tokens)))

    await asyncio.gather(*(client() for _ in range(places)))
    full = FULL_SHARE * arrived[-1][0]
    return sum(count for when, count in arrived if when < full) / full


async def compare(loaded: Loaded, cells: Sequence[Cell], places: int, temperature: float, turns: int) -> None:
    prompts = held_out_prompts(loaded, PROMPTS_PER_PLACE * places, PROMPT_TOKENS)
    engines = {
        cell.name: await start_engine(loaded, functools.partial(build, cell, loaded.settings, loaded.models), places)
        for cell in cells
    }
    rates: dict[str, list[float]] = {cell.name: [] for cell in cells}
    try:
        for turn in range(turns + 1):
            for name, engine in engines.items():
                rate = await tokens_per_second(engine, prompts, places, temperature, turn)
                if turn:
                    rates[name].append(rate)
    finally:
        for engine in engines.values():
            await engine.stop(0)
    plain = rates["plain"]
    for name, found in rates.items():
        ratios = [rate / base for rate, base in zip(found, plain, strict=True)]
        print(
            f"{places:6}{temperature:13g}  {name:12}{statistics.median(found):10.0f}{statistics.median(ratios):11.2f}"
            f"   {min(ratios):.2f} to {max(ratios):.2f}",
            flush=True,
        )


async def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    cells = [find_cell(name) for name in dict.fromkeys(["plain", *arguments.cells.split(",")])]
    print(f"{'places':>6}{'temperature':>13}  {'':12}{'tokens/s':>10}{'of plain':>11}")
    for places in arguments.places:
        loaded = load(load_settings(), cells, places)
        for temperature in arguments.temperatures:
            await compare(loaded, cells, places, temperature, arguments.turns)
    print("\n".join(describe_environment().lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--temperatures", type=lambda text: [float(part) for part in text.split(",")], default=[0.0])
    parser.add_argument("--cells", default="free,default,garbage", help="as for `diffuspec bench`")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
