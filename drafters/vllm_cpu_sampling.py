"""Mends vLLM 0.32's sampling under speculation on CPU (https://github.com/vllm-project/vllm/issues/55005).

There, the CPU stand-in for the kernel that repeats a request's temperature, top-k and top-p for each of its draft
tokens writes into a copy: as soon as one request of a batch is sampled, the batch's draft tokens are judged by
uninitialised memory, greedy neighbours included. And top-k in a batch without any draft token
indexes an empty tensor.
"""

import torch
from torch import Tensor

BROKEN_VERSIONS = ("0.32.",)


def mend_cpu_sampling() -> bool:
    """Replace the two functions, in the process that samples. Returns whether this vLLM needed it."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not vllm.__version__.startswith(BROKEN_VERSIONS) or not current_platform.is_cpu():
        return False
    constrain = rejection_sampler.apply_sampling_constraints

    def constrain_if_any(logits: Tensor, *arguments: object) -> Tensor:
        return constrain(logits, *arguments) if len(logits) else logits

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    if constrain.__name__ != constrain_if_any.__name__:
        rejection_sampler.apply_sampling_constraints = constrain_if_any
    return True


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """`[num_tokens]` each request's value, once per draft token; `cu_num_tokens` `[requests]` counts cumulatively."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = x if replace_from == replace_to else torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
