"""Measure what a diffusion pass adds to the free draft, and what it costs.

    python -m benchmarks.diffusion_gain --temperatures 0,0.5

The default configuration decodes held-out prompts, with a diffusion pass in every step that may draft. Afterwards both
drafts of each step are compared with the text: the free draft, and the draft that was chosen after the pass. Steps are
grouped by the number of tokens that the free draft promised, which the policy knows before a pass.
"""

import argparse
import asyncio
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.decoding import decode, held_out_prompts
from drafters.base import Draft, DraftRequest, num_common
from drafters.pipeline import DraftPipeline
from drafters.policy import Policy, PolicyOptions
from drafters.policy.gains import PROMISES
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


class WatchingPolicy(Policy):
    """Asks for a diffusion pass in every step, and notes both drafts."""

    def __init__(self, options: PolicyOptions) -> None:
        super().__init__(options)
        self.steps: list[Step] = []
        self._diffusion_length = options.diffusion_length

    def pass_lengths(
        self, requests: Sequence[DraftRequest], free: Sequence[Draft], pending: Sequence[int], max_length: int
    ) -> list[int]:
        return [min(request.max_draft_tokens, self._diffusion_length, max_length) for request in requests]

    def choose(
        self,
        requests: Sequence[DraftRequest],
        free: Sequence[Draft],
        found: Sequence[Draft | None],
        spent_seconds: float = 0.0,
    ) -> list[Draft]:
        for request, own, other in zip(requests, free, found, strict=True):
            joined = self._better(request, own, other).tokens
            promise = bisect_left(PROMISES, own.expected_accepted)
            self.steps.append(Step(int(request.request_id), len(request.tokens), promise, own.tokens, joined))
        return super().choose(requests, free, found, spent_seconds)


async def measure(loaded: Loaded, num_prompts: int, temperature: float) -> None:
    pipeline = build(find_cell("default"), loaded.settings, loaded.models)
    assert isinstance(pipeline, DraftPipeline)
    pipeline._policy = policy = WatchingPolicy(pipeline.options)
    prompts = held_out_prompts(loaded, num_prompts, PROMPT_TOKENS)
    decoded = await decode(loaded, lambda: pipeline, prompts, NEW_TOKENS, temperature)
    texts = [(*prompt.tokens, *output) for prompt, output in zip(prompts, decoded.outputs, strict=True)]
    passes = [record.seconds for record in decoded.records if record.drafting.num_diffusion_rows]
    draft, search, verify = (
        1e3 * statistics.median(seconds)
        for seconds in zip(*((each.draft, each.search, each.verify) for each in passes), strict=True)
    )
    print(f"\ntemperature {temperature:g}: {len(policy.steps)} steps; ", end="")
    print(f"medians: drafting {draft:.2f} ms, search {search:.2f}, verification {verify:.2f}")
    print(f"{'free draft promises':>20}{'steps':>7}{'accepted: free':>16}{'joined':>8}{'gain':>6}", end="")
    print(f"{'first right: free':>19}{'joined':>8}")
    edges = [0.0, *PROMISES, np.inf]
    for promise in range(len(edges)):
        steps = [step for step in policy.steps if promise in (step.promise, len(edges) - 1)]
        if not steps:
            continue
        rests = [texts[step.prompt][step.num_tokens :] for step in steps]
        free, joined = (
            np.array([num_common(draft, rest) for draft, rest in zip(drafts, rests, strict=True)])
            for drafts in ([step.free for step in steps], [step.joined for step in steps])
        )
        what = "all" if promise == len(edges) - 1 else f"{edges[promise]:g} to {edges[promise + 1]:g}"
        print(
            f"{what:>20}{len(steps) / len(policy.steps):>7.0%}{free.mean():>16.2f}{joined.mean():>8.2f}"
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
