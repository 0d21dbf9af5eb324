"""One request on its way into vLLM, and its outputs on their way back."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from service.engine.base import (
    FinishReason,
    GenerationRequest,
    SpeculationStats,
    StepTrace,
    StructureSpec,
    TokenDelta,
)
from service.engine.vllm.proposer import RequestOptions
from service.engine.vllm.step_packing import KEY
from verifiers.base import TokenLogprobs
from verifiers.sampling import BANNED, ban, restrict

SEED_MASK = 2**63 - 1
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def sampling_params(request: GenerationRequest, probe: int | None = None) -> Any:
    """vLLM's `SamplingParams`. `probe`: always draft so many tokens (see `service.engine.vllm.proposer`)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rules, speculation = request.rules, request.speculation
    options = RequestOptions(
        name=request.request_id,
        enabled=speculation.enabled,
        max_draft_tokens=speculation.max_draft_tokens,
        policy=speculation.policy,
        trace=speculation.trace,
        probe=probe,
    )
    params = SamplingParams(
        temperature=0.0 if rules.is_greedy else rules.temperature,
        top_k=rules.top_k,
        top_p=rules.top_p,
        min_p=rules.min_p,
        presence_penalty=rules.presence_penalty,
        frequency_penalty=rules.frequency_penalty,
        repetition_penalty=rules.repetition_penalty,
        logit_bias=dict(rules.logit_bias) or None,
        allowed_token_ids=None if rules.allowed_token_ids is None else list(rules.allowed_token_ids),
        seed=None if rules.is_greedy else rules.seed & SEED_MASK,
        max_tokens=max(request.max_tokens, 1),  # vLLM always generates; whoever wants nothing is not shown it
        min_tokens=rules.min_tokens,
        stop_token_ids=list(rules.stop_token_ids),
        ignore_eos=True,  # end tokens that count are among the stop tokens
        logprobs=rules.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        detokenize=False,
        structured_outputs=None if request.structure is None else _structured_outputs(request.structure.spec),
        skip_reading_prefix_cache=None if request.reuse_prefix else True,
        output_kind=RequestOutputKind.DELTA,
        extra_args={KEY: options.to_dict()},
    )
    if rules.bad_words:
        params._bad_words_token_ids = [list(word) for word in rules.bad_words]
    return params


def _structured_outputs(spec: StructureSpec) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if spec.kind == "choice":
        return StructuredOutputsParams(choice=json.loads(spec.definition))
    return StructuredOutputsParams(**{"json" if spec.kind == "json_schema" else spec.kind: spec.definition})


def leaves_no_token(request: GenerationRequest, output: Sequence[int], vocabulary_size: int) -> bool:
    """Whether the structure and the other rules together forbade every token somewhere along `output`.

    vLLM ends such a request as failed and does not say why.
    """
    if request.structure is None:
        return False
    state = request.structure.start()
    for position, token in enumerate([*output, -1]):  # -1: whatever would have come next
        logits = torch.zeros(1, vocabulary_size)
        restrict(logits, state.masks([]))
        ban(logits, request.rules, np.array(output[:position], dtype=np.int32), [])
        if bool((logits == BANNED).all()):
            return True
        if not 0 <= token < vocabulary_size or logits[0, token] == BANNED:
            return False
        state.advance([token])
    return False


class DeltaReader:
    """Turns vLLM's outputs of one request into deltas."""

    def __init__(self, request: GenerationRequest, service_draft_tokens: int) -> None:
        speculation = request.speculation
        wanted = service_draft_tokens if speculation.max_draft_tokens is None else speculation.max_draft_tokens
        self._request = request
        self._num_spec_tokens = max(min(wanted, service_draft_tokens), 0) if speculation.enabled else 0
        self._stats = SpeculationStats(
            num_spec_tokens=self._num_spec_tokens, acceptance_histogram=[0] * (self._num_spec_tokens + 1)
        )
        self._num_traced = 0
        self._is_first = True
        self.has_ended = False

    def read(self, output: Any, steps: Sequence[Sequence[Any]] = ()) -> Iterator[TokenDelta]:
        """The output's tokens: one delta, or one for each of the traced `steps` that made them."""
        completion = output.outputs[0]
        self._count(output, completion)
        self.has_ended = bool(output.finished)
        reason = _REASONS.get(completion.finish_reason, "error") if output.finished else None
        if self._request.max_tokens == 0:
            yield self._delta(output, (), (), reason and "length", None)
            return
        tokens = tuple(map(int, completion.token_ids))
        wanted = self._request.rules.logprobs or 0
        entries = completion.logprobs or [None] * len(tokens)
        logprobs = tuple(
            _token_logprobs(token, known, wanted) for token, known in zip(tokens, entries, strict=True) if known
        )
        parts = self._parts(len(tokens), steps)
        begin = 0
        for number, (count, trace) in enumerate(parts):
            is_last = number == len(parts) - 1
            end = begin + count
            yield self._delta(output, tokens[begin:end], logprobs[begin:end], reason if is_last else None, trace)
            begin = end

    def _parts(self, count: int, steps: Sequence[Sequence[Any]]) -> list[tuple[int, StepTrace | None]]:
        """How the tokens fall into steps."""
        parts: list[tuple[int, StepTrace | None]] = []
        while count > 0 and self._num_traced < len(steps):
            source, drafted, num_accepted = steps[self._num_traced]
            self._num_traced += 1
            size = min(num_accepted + 1, count)
            parts.append((size, StepTrace(source, tuple(drafted), min(num_accepted, size))))
            count -= size
        if count or not parts:
            parts.append((count, None))
        return parts

    def _delta(
        self,
        output: Any,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
        trace: StepTrace | None,
    ) -> TokenDelta:
        is_first, self._is_first = self._is_first, False
        stop_token = output.outputs[0].stop_reason if reason == "stop" else None
        if stop_token is not None and not self._request.include_stop_token:
            tokens, logprobs = tokens[:-1], logprobs[:-1]
        return TokenDelta(
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=_prompt_logprobs(self._request, output) if is_first else (),
            finish_reason=reason,
            stop_token=stop_token,
            trace=trace,
            stats=self._stats,
            num_cached_prompt_tokens=(output.num_cached_tokens or 0) if is_first else 0,
            queue_seconds=_queue_seconds(output) if is_first else 0.0,
        )

    def _count(self, output: Any, completion: Any) -> None:
        metrics = completion.spec_decode_metrics
        if metrics is not None:
            drafted, histogram = metrics.num_draft_tokens, list(metrics.histogram)
        elif output.kv_transfer_params and KEY in output.kv_transfer_params:
            drafted, histogram = output.kv_transfer_params[KEY]
        else:
            return
        self._stats = SpeculationStats(
            num_spec_steps=sum(histogram),
            num_spec_tokens=self._num_spec_tokens,
            num_draft_tokens=drafted,
            num_accepted_draft_tokens=sum(accepted * steps for accepted, steps in enumerate(histogram)),
            acceptance_histogram=histogram[: self._num_spec_tokens + 1],
        )


def _token_logprobs(token: int, entries: Any, count: int) -> TokenLogprobs:
    """From vLLM's mapping of token id to log probability: the token's own, and the `count` best."""
    own = entries[token]
    best = sorted((entry.rank, other, entry.logprob) for other, entry in entries.items())[:count]
    return TokenLogprobs(token, own.logprob, own.rank, tuple((other, logprob) for _, other, logprob in best))


def _prompt_logprobs(request: GenerationRequest, output: Any) -> tuple[TokenLogprobs, ...]:
    if request.prompt_logprobs is None or not output.prompt_logprobs:
        return ()
    tokens = list(map(int, request.prompt))
    return tuple(
        _token_logprobs(token, entries, request.prompt_logprobs)
        for token, entries in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
    )


def _queue_seconds(output: Any) -> float:
    metrics = output.metrics
    return 0.0 if metrics is None else max(metrics.scheduled_ts - metrics.queued_ts, 0.0)
