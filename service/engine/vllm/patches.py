"""Two things that vLLM 0.32 gets wrong, and how we mend them. Nothing here imports vLLM before it is asked to.

Sampling on a CPU. Three faults, the first of them https://github.com/vllm-project/vllm/issues/55005:
- vLLM repeats a request's temperature, top-k and top-p for each of its draft tokens, but the CPU version of that kernel
  writes into a copy. As soon as one request of a batch is sampled, uninitialised memory judges all draft tokens of the
  batch, those of greedy requests included.
- Top-k in a batch without any draft token indexes an empty tensor.
- Where a step reads only a part of a prompt, vLLM draws a token, throws it away and winds the request's generator back
  by its offset. A generator on a CPU has no offset: one seeded prompt longer than a chunk ended the engine.

Processes that outlive the service. A service that is killed outright can tell nobody. vLLM's workers notice the death
of vLLM's engine process, but that process does not notice the death of ours: it would keep the device.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BROKEN_VERSIONS = ("0.32.",)
POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL


def mend_cpu_sampling() -> bool:
    """Replace the broken functions. Call it in the process that samples. Returns whether this vLLM needed it."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not vllm.__version__.startswith(BROKEN_VERSIONS) or not current_platform.is_cpu():
        return False
    constrain = rejection_sampler.apply_sampling_constraints

    def constrain_if_any(logits: "Tensor", *arguments: object) -> "Tensor":
        return constrain(logits, *arguments) if len(logits) else logits

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    if constrain.__name__ != constrain_if_any.__name__:
        rejection_sampler.apply_sampling_constraints = constrain_if_any
        GPUModelRunner._sample = keeping_generators(GPUModelRunner._sample)
        GPUModelRunner._bookkeeping_sync = hiding_generators(GPUModelRunner._bookkeeping_sync)
    return True


def expand_batch_to_tokens(
    x: "Tensor", cu_num_tokens: "Tensor", num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> "Tensor":
    """Return `[num_tokens]` each request's value, once per draft token; values of `replace_from` become `replace_to`.

    x: `[requests]`. cu_num_tokens: `[requests]` draft tokens, counted cumulatively.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x if replace_from == replace_to else x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


def keeping_generators(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `sample`: a draw that is thrown away leaves its request's generator as it was."""

    def sample_and_wind_back(runner: Any, *arguments: Any) -> Any:
        states = {row: runner.input_batch.generators[row].get_state() for row in _rows_drawn_in_vain(runner)}
        output = sample(runner, *arguments)
        for row, state in states.items():
            runner.input_batch.generators[row].set_state(state)
        return output

    return sample_and_wind_back


def hiding_generators(keep_books: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `keep_books`: it finds no generator that it would wind back."""

    def keep_books_only(runner: Any, *arguments: Any) -> Any:
        generators = runner.input_batch.generators
        hidden = {row: generators.pop(row) for row in _rows_drawn_in_vain(runner)}
        try:
            return keep_books(runner, *arguments)
        finally:
            generators.update(hidden)

    return keep_books_only


def _rows_drawn_in_vain(runner: Any) -> list[int]:
    """Rows of the batch whose drawn token is thrown away and that have a generator of their own."""
    is_discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return [row for row in map(int, np.flatnonzero(is_discarded)) if row in runner.input_batch.generators]


def hold_lifeline() -> None:
    """Watch the service from a worker or from vLLM's engine process, and end that process once the service is gone.

    Does nothing where vLLM runs in the service's own process.
    """
    name = multiprocessing.current_process().name
    if multiprocessing.parent_process() is None:
        return
    core = os.getpid() if name.startswith("EngineCore") else os.getppid()
    service = parent_of(core)
    if service is not None and service > 1:
        threading.Thread(target=_watch, args=(core, service), name="lifeline", daemon=True).start()


def parent_of(pid: int) -> int | None:
    """Return the parent's process id; None if there is no such process, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _watch(core: int, service: int) -> None:
    while parent_of(core) == service:
        time.sleep(POLL_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if parent_of(core) is not None:
            os.kill(core, number)
            time.sleep(GRACE_SECONDS)
    os._exit(1)
