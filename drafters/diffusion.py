"""The diffusion drafter: one forward pass proposes a distribution for every masked position of every request.

A request's clean tokens run once and stay in the key-value cache; a draft runs the tokens committed since the last one,
followed by the block of masks. With `attention = "block"` (causal over clean tokens, bidirectional in the block) that
cache is exact. With `attention = "full"` clean tokens would also see what comes after them, so that cached ones are an
approximation, which verification makes safe; `reuse_prefix=False` recomputes everything, for comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from drafters.base import Tokens
from transformer.model import RowBatch, Transformer


@dataclass(frozen=True, slots=True)
class MaskedRequest:
    """One request's share of a pass: propose `length` tokens after `tokens`."""

    request_id: str
    tokens: Tokens  # [any] committed tokens, at least one
    length: int  # tokens to propose, at least one
    hidden_states: Tensor | None = None  # [any, target hidden] the target's, that each token was predicted from


@dataclass(slots=True)
class _Cached:
    """Where a request's clean prefix stands in the cache."""

    slot: int
    offset: int = 0  # the request's position that is the slot's position 0
    length: int = 0  # clean tokens whose keys and values are there, from `offset`


class DiffusionDrafter:
    """A masked diffusion language model with cached prefixes, one slot a request.

    Not thread-safe; used from the engine's thread alone.
    """

    def __init__(
        self, model: Transformer, num_slots: int, vocabulary_size: int, window: int = 256, reuse_prefix: bool = True
    ) -> None:
        """Prepare `num_slots` slots of `window` clean tokens; logits are cut to the target's `vocabulary_size`.

        Raises ValueError if the model has no mask token.
        """
        if not model.config.mask_token_ids:
            raise ValueError("the drafter's config.json names no mask token: it is not a diffusion language model")
        self._model = model
        self._masks = model.config.mask_token_ids
        self._leading = 1 if model.config.logits_shifted else 0  # clean rows that predict: the last token's, if shifted
        self._full = model.config.attention == "full"
        self._reuse_prefix = reuse_prefix
        self._window = window
        self._vocabulary_size = vocabulary_size
        self._excluded = [mask for mask in self._masks if mask < vocabulary_size]
        self._cache = model.new_cache(num_slots, window + self.longest + 1)
        self._free = list(reversed(range(num_slots)))
        self._cached: dict[str, _Cached] = {}

    @property
    def longest(self) -> int:
        """Most tokens one pass proposes: the block the model was trained for."""
        return self._model.config.block_size or 32

    @property
    def temperature(self) -> float:
        """Of the target's distribution that the logits stand for."""
        return self._model.config.logits_temperature

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        """Clean rows that a pass for this request would have to run before its masks."""
        cached = self._cached.get(request_id)
        return min(num_tokens, self._window) if cached is None else num_tokens - cached.offset - cached.length

    @torch.inference_mode()
    def propose(self, requests: Sequence[MaskedRequest]) -> Tensor:
        """Run one pass and return the logits `[sum of lengths, vocabulary]` (float32) of every proposed position.

        Mask tokens and rows beyond the target's vocabulary are -inf. Raises RuntimeError without a free slot.
        """
        tokens: list[int] = []
        slots: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        limits: list[int] = []
        predicting: list[int] = []
        for request in requests:
            cached = self._place(request)
            clean = request.tokens[cached.offset + cached.length :].tolist()
            masks = [self._masks[min(i, len(self._masks) - 1)] for i in range(request.length - self._leading)]
            first_row, start = len(tokens), cached.length
            end = start + len(clean) + len(masks)
            tokens += clean + masks
            slots.append(cached.slot)
            starts.append(start)
            counts.append(len(clean) + len(masks))
            limits += [end] * len(clean) if self._full else range(start + 1, start + len(clean) + 1)
            limits += [end] * len(masks)
            first_predicting = first_row + len(clean) - self._leading
            predicting += range(first_predicting, first_predicting + request.length)
            cached.length += len(clean)
        rows = RowBatch(
            tokens=torch.tensor(tokens, device=self._model.device),
            slots=slots,
            starts=starts,
            counts=counts,
            limits=torch.tensor(limits, device=self._model.device),
        )
        hidden = self._model.forward(rows, self._cache, self._target_states(requests, starts, counts))
        logits = self._model.logits(hidden[torch.tensor(predicting, device=hidden.device)])[:, : self._vocabulary_size]
        if self._excluded:
            logits[:, self._excluded] = -torch.inf
        return logits

    def _target_states(
        self, requests: Sequence[MaskedRequest], starts: Sequence[int], counts: Sequence[int]
    ) -> Tensor | None:
        """What the target knew at every clean row: `[rows, target hidden]`, zero for masks and where it is unknown."""
        width = self._model.config.target_hidden_size
        if not width or all(request.hidden_states is None for request in requests):
            return None
        states = torch.zeros(sum(counts), width, device=self._model.device, dtype=self._model.dtype)
        first_row = 0
        for request, start, count in zip(requests, starts, counts, strict=True):
            if request.hidden_states is not None:
                cached = self._cached[request.request_id]
                clean = request.hidden_states[cached.offset + start : cached.offset + cached.length]
                states[first_row : first_row + len(clean)] = clean
            first_row += count
        return states

    def release(self, request_id: str) -> None:
        """Free the request's slot; harmless if it has none."""
        cached = self._cached.pop(request_id, None)
        if cached is not None:
            self._free.append(cached.slot)
            self._free.sort(reverse=True)  # low slots first keeps the batch's slots close together

    def _place(self, request: MaskedRequest) -> _Cached:
        """The request's slot, with room for its new tokens; the last token is always run again if it predicts."""
        cached = self._cached.get(request.request_id)
        if cached is None:
            if not self._free:
                raise RuntimeError("the drafter has no free slot")
            cached = self._cached[request.request_id] = _Cached(self._free.pop(), offset=0, length=0)
            cached.offset = max(0, len(request.tokens) - self._window)
        if not self._reuse_prefix or len(request.tokens) - cached.offset > self._window:
            kept = self._window if not self._reuse_prefix else self._window // 2
            cached.offset = max(0, len(request.tokens) - kept)
            cached.length = 0
        if self._leading:
            cached.length = min(cached.length, len(request.tokens) - cached.offset - 1)
        return cached


def split_rows(lengths: Sequence[int]) -> list[slice]:
    """The rows of each request in `DiffusionDrafter.propose`'s answer."""
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
