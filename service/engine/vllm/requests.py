"""A request's way through vLLM: its parameters going in, its outputs coming out, and which requests are live."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from drafters.base import max_draft_tokens
from service.engine.base import (
    FinishReason,
    GenerationRequest,
    SpeculationStats,
    StepTrace,
    StructureSpec,
    TokenDelta,
)
from service.engine.pace import Pace
from service.engine.vllm.records import KEY, RequestOptions
from verifiers.base import TokenLogprobs
from verifiers.sampling import BANNED, ban, restrict

SEED_MASK = 2**63 - 1
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class LiveRequests:
    """The requests that vLLM has now. Bound to one event loop.

    Progress is any step of vLLM's. vLLM hangs if there is none while requests are live.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens: dict[str, int] = {}  # request id -> tokens of its prompt and output, in the order of arrival
        self._idle = asyncio.Event()
        self._idle.set()
        self._endings = Pace(clock)
        self._progress_at = 0.0  # time of the latest step, or of the first request after an idle time

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tokens

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    @contextlib.contextmanager
    def hold(self, request_id: str, num_tokens: int) -> Iterator[None]:
        """Count the request as live while the block lasts. num_tokens: the most that prompt and output may have."""
        if not self._tokens:
            self.note_progress()
        self._tokens[request_id] = num_tokens
        self._idle.clear()
        try:
            yield
        finally:
            del self._tokens[request_id]
            self._endings.note()
            if not self._tokens:
                self._endings.forget()
                self._idle.set()

    def note_progress(self) -> None:
        self._progress_at = self._clock()

    @property
    def seconds_without_progress(self) -> float:
        return self._clock() - self._progress_at if self._tokens else 0.0

    def waiting_tokens(self, num_places: int) -> list[int]:
        """Return the tokens of each waiting request. vLLM does not say who runs: assume the first `num_places`."""
        return list(islice(self._tokens.values(), num_places, None))

    def what_is_full(self, num_places: int, max_waiting: int, max_waiting_tokens: int | None) -> str:
        """Return, for people, the bound that keeps one more request out; empty if there is room."""
        waiting = self.waiting_tokens(num_places)
        if len(self) >= num_places + max_waiting:
            if not waiting:
                return f"{len(self)} requests are running already, and none may wait"
            return f"{len(waiting)} requests are waiting already"
        if waiting and max_waiting_tokens is not None and sum(waiting) >= max_waiting_tokens:
            return f"requests of {sum(waiting)} tokens are waiting already"
        return ""

    def retry_after(self, num_ahead: int) -> float:
        """Return the seconds until `num_ahead` places should be free, from the rate at which requests ended lately."""
        return self._endings.seconds_until(num_ahead)

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until no request is live, at most `seconds`; returns whether that was reached."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return not self._tokens


def sampling_params(request: GenerationRequest, probe: int | None = None) -> Any:
    """Return vLLM's `SamplingParams`. probe: draft exactly so many tokens (see `service.engine.vllm.calibration`)."""
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
        max_tokens=max(request.max_tokens, 1),  # vLLM generates at least one; `DeltaReader` hides it if none was wanted
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
    """Return whether the structure and the other rules together forbid every token at some place of `output`.

    vLLM ends such a request as failed and does not say why.
    """
    if request.structure is None:
        return False
    state = request.structure.start()
    for position, token in enumerate([*output, -1]):  # -1: the token that would have come next
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
        self._request = request
        self._num_spec_tokens = max_draft_tokens(
            speculation.enabled, speculation.max_draft_tokens, service_draft_tokens
        )
        self._stats = SpeculationStats(
            num_spec_tokens=self._num_spec_tokens, acceptance_histogram=[0] * (self._num_spec_tokens + 1)
        )
        self._num_traced = 0
        self._is_first = True
        self.has_ended = False

    def read(self, output: Any, steps: Sequence[Sequence[Any]] = ()) -> Iterator[TokenDelta]:
        """Yield the output's tokens: one delta, or one for each of the traced `steps` that made them."""
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
        pieces = self._by_step(len(tokens), steps)
        begin = 0
        for number, (count, trace) in enumerate(pieces):
            is_last = number == len(pieces) - 1
            end = begin + count
            yield self._delta(output, tokens[begin:end], logprobs[begin:end], reason if is_last else None, trace)
            begin = end

    def _by_step(self, count: int, steps: Sequence[Sequence[Any]]) -> list[tuple[int, StepTrace | None]]:
        """Divide `count` tokens among the steps that made them."""
        pieces: list[tuple[int, StepTrace | None]] = []
        while count > 0 and self._num_traced < len(steps):
            source, drafted, num_accepted = steps[self._num_traced]
            self._num_traced += 1
            size = min(num_accepted + 1, count)
            pieces.append((size, StepTrace(source, tuple(drafted), min(num_accepted, size))))
            count -= size
        if count or not pieces:
            pieces.append((count, None))
        return pieces

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
        """Take over vLLM's counts, which come with the last output, or ours, which come with every one."""
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
    """Return the token's own log probability and the `count` best. entries: vLLM's, by token id."""
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
