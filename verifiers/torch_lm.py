"""The verifier that runs this project's own transformer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformer.cache import lazy_zeros
from transformer.integer_model import IntegerTransformer
from transformer.matrix import is_plain
from transformer.model import RowBatch, Transformer
from verifiers.acceptance import accept
from verifiers.base import TokenIds, TokenLogprobs, VerifyRequest, VerifyResult
from verifiers.draws import NO_TOKEN, draw_rows, most_probable
from verifiers.logprobs import token_logprobs
from verifiers.sampling import apply_rules, changes_logits, restrict

log = logging.getLogger(__name__)

DRAFT_ROOM = 64  # positions after the context, for drafts that reach beyond its end


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The rows of the head's output that belong to one request, in this order."""

    prompt: slice  # rows for the prompt's log probabilities
    drawn: slice  # the rows of the last token and of each draft token; empty until the prompt is fully read


class TorchVerifier:
    """The target model with its key-value cache. Not thread-safe."""

    def __init__(
        self,
        model: Transformer | IntegerTransformer,
        num_slots: int,
        context_length: int,
        num_tokens: int | None = None,
        keep_hidden_states: bool = False,
    ) -> None:
        """Allocate a cache for `num_slots` sequences.

        num_tokens: the tokenizer's length; ids from here on are never drawn. None: all may be.
        keep_hidden_states: keep them for a drafter that reads them.
        """
        self._model = model
        self._num_slots = num_slots
        self._context_length = context_length
        self._num_tokens = min(num_tokens or model.config.vocabulary_size, model.config.vocabulary_size)
        self._cache: Any = model.new_cache(
            num_slots, context_length + DRAFT_ROOM
        )  # each kind of model has a cache of its own
        self._states: Tensor | None = None  # [slots, positions, hidden] that each token is predicted from
        if keep_hidden_states:
            shape = (num_slots, context_length + DRAFT_ROOM + 1, model.config.hidden_size)
            self._states = lazy_zeros(shape, model.device, model.dtype)

    @property
    def vocabulary_size(self) -> int:
        return self._model.config.vocabulary_size

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot's keys and values over another's."""
        self._cache.copy_slot(source, target, length)
        if self._states is not None:
            with torch.inference_mode():
                self._states[target, : length + 1] = self._states[source, : length + 1]

    def hidden_states(self, slot: int) -> Tensor | None:
        return None if self._states is None else self._states[slot]

    @torch.inference_mode()
    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult]:
        """Run one forward pass over all rows of all requests and check their drafts.

        A request whose logits allow no token (a broken checkpoint, or rules that ban everything) gets a result with
        `error`. The other requests are not affected.
        """
        if not requests:
            return []
        logits, spans = self._run(requests)
        drawn = self._draw(requests, logits, spans)
        return [
            self._result(request, logits, span, drawn[span.drawn])
            for request, span in zip(requests, spans, strict=True)
        ]

    def _run(self, requests: Sequence[VerifyRequest]) -> tuple[Tensor, list[RowSpan]]:
        """Run the model; return the logits of the rows that are needed, and each request's span of them."""
        tokens: list[int] = []
        counts: list[int] = []
        needed: list[int] = []  # flat rows
        spans: list[RowSpan] = []
        for request in requests:
            first_row, stop = len(tokens), request.num_cached + request.num_new
            tokens += as_list(request.tokens[request.num_cached : stop])
            tokens += self._runnable(request.draft)
            counts.append(request.num_new + len(request.draft))
            first_needed = len(needed)
            if request.prompt_logprobs is not None:
                needed += range(first_row, first_row + num_prompt_rows(request))
            first_drawn = len(needed)
            if stop == len(request.tokens):
                needed += range(first_row + request.num_new - 1, len(tokens))
            spans.append(RowSpan(slice(first_needed, first_drawn), slice(first_drawn, len(needed))))
        device = self._model.device
        batch = RowBatch(
            torch.tensor(tokens, device=device),
            [request.slot for request in requests],
            [request.num_cached for request in requests],
            counts,
            bounds_padding=device.type == "cpu",  # drafts differ much in length; on a GPU, more calls cost more
        )
        hidden = self._model.forward(batch, self._cache)
        self._keep_states(requests, counts, hidden)
        if len(needed) < len(tokens) or needed != list(range(len(tokens))):
            hidden = hidden.index_select(0, torch.tensor(needed, dtype=torch.int64, device=device))
        return self._model.logits(hidden), spans

    def _keep_states(self, requests: Sequence[VerifyRequest], counts: Sequence[int], hidden: Tensor) -> None:
        if self._states is None:
            return
        states: Any = self._states
        rows: Any = hidden
        if is_plain(hidden):  # numpy assigns three times as fast as torch
            states, rows = states.numpy(), rows.numpy()
        first_row = 0
        for request, count in zip(requests, counts, strict=True):
            first = request.num_cached + 1
            states[request.slot, first : first + count] = rows[first_row : first_row + count]
            first_row += count

    def _runnable(self, draft: Sequence[int]) -> Sequence[int]:
        """Replace ids outside the vocabulary, so that the model can run the draft; verification rejects them anyway."""
        size = self.vocabulary_size
        return draft if all(0 <= token < size for token in draft) else [t if 0 <= t < size else 0 for t in draft]

    def _draw(self, requests: Sequence[VerifyRequest], logits: Tensor, spans: Sequence[RowSpan]) -> list[int]:
        """Return the target's own token for each row of `logits`; NO_TOKEN if there is none."""
        allowed = logits
        changed = [changes_logits(request.rules) or request.allowed is not None for request in requests]
        if any(changed):
            allowed = logits.clone()  # log probabilities are reported from the raw logits
            for request, span, is_changed in zip(requests, spans, changed, strict=True):
                if is_changed and span.drawn.stop > span.drawn.start:
                    rows = allowed[span.drawn, : self._num_tokens]
                    try:
                        restrict(rows, request.allowed)
                        apply_rules(rows, request.rules, request.tokens, request.num_prompt, request.draft)
                    except Exception:  # an error in one request's rules must not affect the others
                        log.exception("the sampling rules of a request failed")
                        rows.fill_(-torch.inf)
        tokens = most_probable(allowed, self._num_tokens)
        sampled = [
            (row, request, len(request.tokens) + index)
            for request, span in zip(requests, spans, strict=True)
            if not request.rules.is_greedy
            for index, row in enumerate(range(span.drawn.start, span.drawn.stop))
            if tokens[row] != NO_TOKEN
        ]
        if sampled:
            rows_taken = [row for row, _, _ in sampled]
            rules = [request.rules for _, request, _ in sampled]
            positions = [position for _, _, position in sampled]
            drawn = draw_rows(allowed, rows_taken, rules, positions, self._num_tokens)
            for row, token in zip(rows_taken, drawn, strict=True):
                tokens[row] = token
        return tokens

    def _result(self, request: VerifyRequest, logits: Tensor, span: RowSpan, drawn: Sequence[int]) -> VerifyResult:
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if request.prompt_logprobs is not None:
            first = request.num_cached + 1
            seen = as_list(request.tokens[first : first + span.prompt.stop - span.prompt.start])
            prompt_logprobs = token_logprobs(logits[span.prompt], seen, request.prompt_logprobs, self._num_tokens)
        if not drawn:
            return VerifyResult(None, prompt_logprobs)
        if NO_TOKEN in drawn:
            self._cache.clear_slot(request.slot, len(request.tokens) + drawn.index(NO_TOKEN))
        verification = accept(request.draft, drawn)
        if verification.next_token == NO_TOKEN:
            row = logits[span.drawn.start + verification.num_accepted]
            if request.draft and not row.isfinite().all():
                return self._without_draft(request)
            self._cache.clear_slot(request.slot)
            error, is_request_at_fault = self._complaint(request, row, verification.num_accepted)
            return VerifyResult(None, prompt_logprobs, error, is_request_at_fault)
        if request.rules.logprobs is not None:
            committed = drawn[: verification.num_accepted + 1]
            rows = logits[span.drawn][: len(committed)]
            reported = token_logprobs(rows, committed, request.rules.logprobs, self._num_tokens)
            verification = replace(verification, logprobs=reported)
        return VerifyResult(verification, prompt_logprobs)

    def _without_draft(self, request: VerifyRequest) -> VerifyResult:
        """Verify again without the draft: a draft token whose row overflows spoils earlier rows, although unseen.

        Rows in the same attention call multiply its keys and values by zero, and zero times NaN is NaN.
        """
        self._cache.clear_slot(request.slot, request.num_cached)
        allowed = None if request.allowed is None else request.allowed[:1]
        return self.verify([replace(request, draft=(), allowed=allowed)])[0]

    def _complaint(self, request: VerifyRequest, logits: Tensor, num_accepted: int) -> tuple[str, bool]:
        """Return why the row after the accepted tokens, `logits` [vocabulary], gives no token.

        Also return whether the request's rules are at fault.
        """
        position = len(request.tokens) + num_accepted
        if not bool(logits.isfinite().all()):
            return f"The model's output at position {position} is not a number.", False
        allowed = None if request.allowed is None else request.allowed[num_accepted : num_accepted + 1]
        try:
            restrict(logits.clone().unsqueeze(0), allowed)
            apply_rules(logits.clone().unsqueeze(0), request.rules, request.tokens, request.num_prompt, ())
        except Exception:
            return f"The rules of the request could not be applied at position {position}.", False
        return f"The rules of the request ban every token at position {position}.", True


def as_list(tokens: TokenIds) -> list[int]:
    """Return the tokens as Python integers."""
    return tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)


def num_prompt_rows(request: VerifyRequest) -> int:
    """Return how many of the new rows predict a token of the prompt."""
    return max(0, min(request.num_cached + request.num_new, request.num_prompt - 1) - request.num_cached)
