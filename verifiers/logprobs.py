"""Log probabilities of committed tokens, from the target's logits before any rule was applied."""

from collections.abc import Sequence

import torch
from torch import Tensor

from verifiers.base import TokenLogprobs


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], num_alternatives: int, num_tokens: int
) -> tuple[TokenLogprobs, ...]:
    """Return one entry per row of logits [rows, vocabulary], for the token that was committed there.

    The alternatives are the most probable of the first `num_tokens` ids: later ids have no text.
    """
    if not tokens:
        return ()
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))
    ranks = 1 + (logprobs > chosen).sum(dim=-1)
    top = logprobs[:, :num_tokens].topk(min(num_alternatives, num_tokens), dim=-1)
    rows = zip(
        tokens, chosen.flatten().tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
    )
    return tuple(
        TokenLogprobs(token, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token, logprob, rank, ids, values in rows
    )
