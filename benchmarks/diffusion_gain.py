"""Measure what a diffusion pass adds to the free draft, and what it costs.

    python -m benchmarks.diffusion_gain --temperatures 0,0.5

The default configuration decodes held-out prompts, with a diffusion pass in every step that may draft. Afterwards both
drafts of each step are compared with the text: the free draft, and the draft that was chosen after the pass. Steps are
grouped by the number of tokens that the free draft promised, which the policy knows before a pass.
"""

import argparse
import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.decoding import decode, held_out_prompts
from drafters.base import DraftRequest
from drafters.candidate import Candidate
from drafters.estimates import DiffusionForecast
from drafters.pipeline import DraftPipeline
from drafters.planner import DraftPlanner, LengthOptions, num_common
from service.bench.cells import build, find_cell
from service.bench.environment import describe_environment
from service.bench.loading import Loaded, load
from service.settings import load_settings

PROMPT_TOKENS, NEW_TOKENS = 192, 128


@dataclass(frozen=True, slots=True)
class Step:
    """Both drafts of a step."""

    prompt: int
    num_tokens: int  # that were committed before it
    promise: int  # class of what the free draft promised
    free: tuple[int, ...]
    joined: tuple[int, ...]


class WatchingPlanner(DraftPlanner):
    """Asks for a diffusion pass in every step, and notes what came of it."""

    def __init__(self, options: LengthOptions) -> None:
        super().__init__(options)
        self.steps: list[Step] = []
        self._length = options.diffusion_length

    def plan_diffusion(
        self, candidates: Sequence[Candidate], longest: int, pending_rows: Callable[[DraftRequest], int]
    ) -> None:
        super().plan_diffusion(candidates, longest, pending_rows)
        for candidate in candidates:
            candidate.diffusion_length = min(candidate.cap, self._length, longest)

    def settle(self, candidates: Sequence[Candidate]) -> None:
        super().settle(candidates)
        for candidate in candidates:
            request = candidate.request
            free = candidate.tokens if candidate.path is None else candidate.free_tokens
            place = int(request.request_id), len(request.tokens), candidate.forecast_class[1]
            self.steps.append(Step(*place, free, candidate.tokens))


async def measure(loaded: Loaded, num_prompts: int, temperature: float) -> None:
    pipeline = build(find_cell("default"), loaded.settings, loaded.models)
    assert isinstance(pipeline, DraftPipeline)
    pipeline._planner = planner = WatchingPlanner(pipeline._lengths)
    prompts = held_out_prompts(loaded, num_prompts, PROMPT_TOKENS)
    decoded = await decode(loaded, lambda: pipeline, prompts, NEW_TOKENS, temperature)
    texts = [(*prompt.tokens, *output) for prompt, output in zip(prompts, decoded.outputs, strict=True)]
    passes = [record.seconds for record in decoded.records if record.drafting.num_diffusion_rows]
    draft, search, verify = (
        1e3 * statistics.median(seconds)
        for seconds in zip(*((each.draft, each.search, each.verify) for each in passes), strict=True)
    )
    print(f"\ntemperature {temperature:g}: {len(planner.steps)} steps; ", end="")
    print(f"medians: drafting {draft:.2f} ms, search {search:.2f}, verification {verify:.2f}")
    print(f"{'free draft promises':>20}{'steps':>7}{'accepted: free':>16}{'joined':>8}{'gain':>6}", end="")
    print(f"{'first right: free':>19}{'joined':>8}")
    edges = [0.0, *DiffusionForecast.PROMISES, np.inf]
    for promise in range(len(edges)):
        steps = [step for step in planner.steps if promise in (step.promise, len(edges) - 1)]
        if not steps:
            continue
        rests = [texts[step.prompt][step.num_tokens :] for step in steps]
        free, joined = (
            np.array([num_common(draft, rest) for draft, rest in zip(drafts, rests, strict=True)])
            for drafts in ([step.free for step in steps], [step.joined for step in steps])
        )
        what = "all" if promise == len(edges) - 1 else f"{edges[promise]:g} to {edges[promise + 1]:g}"
        print(
            f"{what:>20}{len(steps) / len(planner.steps):>7.0%}{free.mean():>16.2f}{joined.mean():>8.2f}"
            f"{joined.mean() - free.mean():>6.2f}{(free > 0).mean():>19.0%}{(joined > 0).mean():>8.0%}"
        )


async def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    loaded = load(load_settings(), [find_cell("default")], 1)
    for temperature in arguments.temperatures:
        await measure(loaded, arguments.num_prompts, temperature)
    print("\n".join(describe_environment().lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperatures", type=lambda text: [float(part) for part in text.split(",")], default=[0.0])
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
