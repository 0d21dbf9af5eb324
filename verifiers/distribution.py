"""Turn logits into the distribution that a token is drawn from: temperature, top-k, top-p, min-p."""

from collections.abc import Sequence

import torch
from torch import Tensor

from verifiers.base import SamplingRules

FIRST_CANDIDATES = 128  # enough for most rows; sorting a whole vocabulary costs more than the model's head


def token_weights(logits: Tensor, rules: Sequence[SamplingRules]) -> Tensor:
    """Return unnormalised weights of each row's tokens: float32 [rows, vocabulary], for logits of the same shape.

    `rules` has one entry per row, each with a temperature above 0. A row's result depends on that row alone.
    If tokens tie at the edge of top-k or top-p, all of them are kept.
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)  # subtract before dividing: tiny temperatures cannot overflow
    temperatures = column([rule.temperature for rule in rules], logits)
    weights = torch.softmax(shifted / temperatures, dim=-1)
    sorting = [row for row, rule in enumerate(rules) if rule.top_k > 0 or rule.top_p < 1.0]
    if sorting:
        chosen = torch.tensor(sorting, device=logits.device)
        weights[chosen] = keep_top(weights[chosen], [rules[row] for row in sorting], FIRST_CANDIDATES)
    if any(rule.min_p > 0.0 for rule in rules):
        floors = column([rule.min_p for rule in rules], logits) * weights.amax(dim=-1, keepdim=True)
        weights.masked_fill_(weights < floors, 0.0)
    return weights


def keep_top(weights: Tensor, rules: Sequence[SamplingRules], num_candidates: int) -> Tensor:
    """Zero the weights that top-k leaves out, then those that top-p of the rest does.

    Looks at the best `num_candidates` of each row first. Rows that need more are sorted in full.
    """
    vocabulary_size = weights.shape[1]
    width = min(num_candidates, vocabulary_size)
    best = weights.topk(width, dim=-1).values
    top_k = column([min(rule.top_k or vocabulary_size, vocabulary_size) for rule in rules], weights, torch.int64)
    smallest = best.gather(1, top_k.clamp(max=width) - 1).masked_fill(top_k >= vocabulary_size, 0.0)
    kept = weights.masked_fill(weights < smallest, 0.0)
    best = best.masked_fill(best < smallest, 0.0)
    top_p = column([rule.top_p for rule in rules], weights, torch.float64)
    wanted = top_p * kept.sum(dim=-1, keepdim=True, dtype=torch.float64)
    reached = best.cumsum(dim=-1, dtype=torch.float64)
    num_needed = 1 + (reached < wanted).sum(dim=-1, keepdim=True)  # the smallest number that reaches the wanted mass
    smallest = best.gather(1, num_needed.clamp(max=width) - 1).masked_fill(top_p >= 1.0, 0.0)
    kept.masked_fill_(kept < smallest, 0.0)
    short = ((top_k > width) & (top_k < vocabulary_size)) | ((num_needed > width) & (top_p < 1.0))
    if width < vocabulary_size and bool(short.any()):
        rows = short.flatten().nonzero().flatten()
        kept[rows] = keep_top(weights[rows], [rules[row] for row in rows.tolist()], vocabulary_size)
    return kept


def column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one value per row: [rows, 1] on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)
