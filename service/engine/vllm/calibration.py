"""Step costs, measured at start-up: requests that exist to be timed, and the steps that they made.

The service sends them through vLLM like any other request; the worker times their steps.
"""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from drafters.base import Draft, Pipeline, StepRecord
from service.engine.base import GenerationRequest
from verifiers.base import SamplingRules

PROBES = ((1, 0), (1, 0), (1, 1), (1, 3), (1, 7), (1, 15), (1, 31), (4, 0), (4, 7), (16, 0), (8, 7), (16, 7))
"""(requests, draft tokens of each). The first is only a warm-up."""
PROBE_STEPS = 8
PROMPT_TOKENS = 48
SLOW_PROBE_SECONDS = 10.0  # after so long no more batches are measured; the policy learns their costs while serving


async def run_probes(
    run: Callable[[GenerationRequest, int], Awaitable[None]],
    max_running: int,
    max_draft_tokens: int,
    context_length: int,
    vocabulary_size: int,
    clock: Callable[[], float],
) -> None:
    """Run the probes that this engine can serve. `run` takes a request and the length of its drafts."""
    started = clock()
    for batch, drafted in PROBES:
        if batch > max_running or drafted > max_draft_tokens:
            continue
        if clock() - started > SLOW_PROBE_SECONDS and batch > 1:
            break
        requests = _probe_requests(batch, drafted, context_length, vocabulary_size)
        await asyncio.gather(*(run(request, drafted) for request in requests))


def _probe_requests(batch: int, drafted: int, context_length: int, vocabulary_size: int) -> list[GenerationRequest]:
    """Return `batch` requests over random tokens that last about `PROBE_STEPS` steps."""
    generator = np.random.default_rng((batch, drafted))
    length = min(PROMPT_TOKENS, context_length // 2)
    count = max(min(PROBE_STEPS + 1 + drafted, context_length - length), 1)
    return [
        GenerationRequest(
            request_id=f"probe-{batch}-{drafted}-{i}",
            prompt=generator.integers(vocabulary_size, size=length).tolist(),
            max_tokens=count,
            rules=SamplingRules(seed=i, temperature=0.0),
        )
        for i in range(batch)
    ]


def probe_draft(last_token: int, length: int, vocabulary_size: int) -> Draft:
    """Return a draft that is almost surely wrong but costs as much to verify as any other."""
    return Draft(tuple((last_token + 1 + i) % vocabulary_size for i in range(length)), "free")


class ProbeSteps:
    """The steps that probe requests made, in the worker."""

    def __init__(self) -> None:
        self._steps: dict[tuple[int, int], list[StepRecord]] = {}  # (requests, draft tokens of all of them) -> steps

    def keep(self, record: StepRecord, num_requests: int, drafted: int) -> None:
        """Note a step of `num_requests` probes, if it read no prompt and verified `drafted` tokens for each."""
        if record.num_prefill_rows == 0 and record.num_rows == num_requests * (1 + drafted):
            self._steps.setdefault((num_requests, num_requests * drafted), []).append(record)

    def calibrate(self, pipeline: Pipeline) -> dict[int, float]:
        """Tell the pipeline what the probes cost, and forget them. Returns seconds by rows."""
        steps, self._steps = self._steps, {}
        by_rows: dict[int, float] = {}
        by_requests: dict[int, float] = {}
        for (batch, drafted), records in sorted(steps.items()):  # few requests first: their passes tell what rows cost
            seconds = float(np.median([record.verify_seconds for record in records[1:] or records]))
            if drafted == 0:
                by_requests[batch] = seconds
            if drafted > 0 or batch == 1:
                by_rows.setdefault(batch + drafted, seconds)
        if by_rows:
            pipeline.calibrate(by_rows, by_requests or None)
            for (_, drafted), records in steps.items():
                if drafted == 0:
                    for record in records[1:]:
                        pipeline.observe(record)  # for the time between two steps
        return by_rows
