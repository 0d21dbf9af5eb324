"""Requests that exist to be timed: what a step costs in vLLM by batch and drafted tokens."""

import numpy as np

from service.engine.base import GenerationRequest
from verifiers.base import SamplingRules

PROBES = ((1, 0), (1, 0), (1, 1), (1, 3), (1, 7), (1, 15), (1, 31), (4, 0), (4, 7), (16, 0), (8, 7), (16, 7))
"""(requests, draft tokens of each). The first is only a warm-up."""
PROBE_STEPS = 8
PROMPT_TOKENS = 48
SLOW_PROBE_SECONDS = 10.0  # after so long, batches are left to what is learned while serving


def probe_requests(batch: int, drafted: int, context_length: int, vocabulary_size: int) -> list[GenerationRequest]:
    """`batch` requests over random tokens that last about `PROBE_STEPS` steps."""
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
