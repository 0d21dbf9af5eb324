"""Mends vLLM 0.32's sampling under speculation on CPU (https://github.com/vllm-project/vllm/issues/55005).

There, the CPU stand-in for the kernel that repeats a request's temperature, top-k and top-p for each of its draft
tokens writes into a copy: as soon as one request of a batch is sampled, the batch's draft tokens are judged by
uninitialised memory, greedy neighbours included. And top-k in a batch without any draft token
indexes an empty tensor.

Also mended: where only a part of a prompt has been read, vLLM draws a token in vain and then winds the request's
generator back by its offset. A CPU's generator has none: one seeded prompt longer than a chunk ended the engine.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

BROKEN_VERSIONS = ("0.32.",)


def mend_cpu_sampling() -> bool:
    """Replace the functions, in the process that samples. Returns whether this vLLM needed it."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not vllm.__version__.startswith(BROKEN_VERSIONS) or not current_platform.is_cpu():
        return False
    constrain = rejection_sampler.apply_sampling_constraints

    def constrain_if_any(logits: Tensor, *arguments: object) -> Tensor:
        return constrain(logits, *arguments) if len(logits) else logits

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    if constrain.__name__ != constrain_if_any.__name__:
        rejection_sampler.apply_sampling_constraints = constrain_if_any
        GPUModelRunner._sample = keeping_generators(GPUModelRunner._sample)
        GPUModelRunner._bookkeeping_sync = hiding_generators(GPUModelRunner._bookkeeping_sync)
    return True


def keeping_generators(sample: Callable[..., Any]) -> Callable[..., Any]:
    """`sample`, after which the generators of requests that are still being read are as they were."""

    def sample_and_wind_back(runner: Any, *arguments: Any) -> Any:
        states = {row: runner.input_batch.generators[row].get_state() for row in _seeded_in_vain(runner)}
        output = sample(runner, *arguments)
        for row, state in states.items():
            runner.input_batch.generators[row].set_state(state)
        return output

    return sample_and_wind_back


def hiding_generators(keep_books: Callable[..., Any]) -> Callable[..., Any]:
    """`keep_books`, which finds no generator to wind back."""

    def keep_books_only(runner: Any, *arguments: Any) -> Any:
        generators = runner.input_batch.generators
        hidden = {row: generators.pop(row) for row in _seeded_in_vain(runner)}
        try:
            return keep_books(runner, *arguments)
        finally:
            generators.update(hidden)

    return keep_books_only


def _seeded_in_vain(runner: Any) -> list[int]:
    """Rows of the batch whose drawn token is thrown away, and that have a generator of their own."""
    is_discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return [row for row in map(int, np.flatnonzero(is_discarded)) if row in runner.input_batch.generators]


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """`[num_tokens]` each request's value, once per draft token; `cu_num_tokens` `[requests]` counts cumulatively."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = x if replace_from == replace_to else torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
