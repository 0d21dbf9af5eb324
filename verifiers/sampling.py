"""Sampling rules that depend on a request's own tokens: bans, biases and penalties, on every verified row.

Row j of a request has the context `tokens + draft[:j]`, as in plain decoding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from verifiers.base import SamplingRules, TokenIds

BANNED = float("-inf")


def changes_logits(rules: SamplingRules) -> bool:
    """Return whether `apply_rules` changes anything."""
    return bool(
        rules.allowed_token_ids is not None
        or rules.bad_words
        or (rules.min_tokens > 0 and rules.stop_token_ids)
        or rules.logit_bias
        or rules.repetition_penalty != 1.0
        or rules.presence_penalty
        or rules.frequency_penalty
    )


def apply_rules(logits: Tensor, rules: SamplingRules, tokens: TokenIds, num_prompt: int, draft: Sequence[int]) -> None:
    """Change one request's rows in place, logits [len(draft) + 1, vocabulary] float32, in the standard order.

    The order is: bans (allowed tokens, bad words, stop tokens before `min_tokens`), logit bias, repetition penalty
    (prompt and output), frequency and presence penalty (output). Ids beyond the vocabulary are ignored.
    """
    ban(logits, rules, tokens[num_prompt:], draft)
    bias = {token: value for token, value in rules.logit_bias.items() if 0 <= token < logits.shape[1]}
    if bias:
        logits[:, list(bias)] += torch.tensor(list(bias.values()), device=logits.device)
    if rules.repetition_penalty != 1.0 or rules.presence_penalty or rules.frequency_penalty:
        penalize(logits, rules, tokens, num_prompt, draft)


def restrict(logits: Tensor, allowed: NDArray[np.bool_] | None) -> None:
    """Ban the tokens of logits [rows, vocabulary] that `allowed` [rows, ids] does not allow, and ids beyond it."""
    if allowed is None:
        return
    known = torch.from_numpy(allowed[:, : logits.shape[1]]).to(logits.device)
    logits[:, : known.shape[1]].masked_fill_(~known, BANNED)
    logits[:, known.shape[1] :] = BANNED


def ban(logits: Tensor, rules: SamplingRules, output: TokenIds, draft: Sequence[int]) -> None:
    """Set the forbidden tokens of each row to -inf."""
    vocabulary_size = logits.shape[1]
    if rules.allowed_token_ids is not None:
        forbidden = torch.ones(vocabulary_size, dtype=torch.bool, device=logits.device)
        forbidden[[token for token in rules.allowed_token_ids if 0 <= token < vocabulary_size]] = False
        logits.masked_fill_(forbidden, BANNED)
    for row, token in banned_by_words(rules.bad_words, output, draft):
        if 0 <= token < vocabulary_size:
            logits[row, token] = BANNED
    num_early = min(rules.min_tokens - len(output), len(draft) + 1)
    if num_early > 0:
        logits[:num_early, [token for token in rules.stop_token_ids if 0 <= token < vocabulary_size]] = BANNED


def banned_by_words(
    bad_words: Sequence[Sequence[int]], output: TokenIds, draft: Sequence[int]
) -> list[tuple[int, int]]:
    """Return (row, token) pairs: the last token of a bad word, for each row whose output ends with its other tokens."""
    max_length = max((len(word) for word in bad_words), default=0)
    tail = [*output[max(0, len(output) - max_length) :], *draft]
    num_before = len(tail) - len(draft)
    return [
        (row, word[-1])
        for row in range(len(draft) + 1)
        for word in bad_words
        if word and ends_with(tail[: num_before + row], word[:-1])
    ]


def ends_with(tokens: TokenIds, ending: Sequence[int]) -> bool:
    return len(ending) <= len(tokens) and list(tokens[len(tokens) - len(ending) :]) == list(ending)


def penalize(logits: Tensor, rules: SamplingRules, tokens: TokenIds, num_prompt: int, draft: Sequence[int]) -> None:
    """Apply repetition, frequency and presence penalties; the draft before each row counts as output."""
    vocabulary_size = logits.shape[1]
    in_prompt = torch.from_numpy(occurrences(tokens[:num_prompt], vocabulary_size) > 0).to(logits.device)
    counts = np.tile(occurrences(tokens[num_prompt:], vocabulary_size), (len(draft) + 1, 1))
    for row, token in enumerate(draft):
        if 0 <= token < vocabulary_size:
            counts[row + 1 :, token] += 1
    in_output = torch.from_numpy(counts).to(logits.device)
    if rules.repetition_penalty != 1.0:
        penalized = torch.where(logits > 0, logits / rules.repetition_penalty, logits * rules.repetition_penalty)
        torch.where(in_prompt | (in_output > 0), penalized, logits, out=logits)
    logits -= rules.frequency_penalty * in_output + rules.presence_penalty * (in_output > 0)


def occurrences(tokens: TokenIds, vocabulary_size: int) -> NDArray[np.int64]:
    """Count how often each id occurs: int64 [vocabulary]; ids beyond it are left out."""
    ids = np.asarray(tokens, dtype=np.int64)
    counts: NDArray[np.int64] = np.bincount(ids, minlength=vocabulary_size)
    return counts[:vocabulary_size]
