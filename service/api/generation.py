"""Runs all sequences of one HTTP request: admitted within the key's limits, merged into one stream, counted."""

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Generic, TypeVar, cast

from service.api.body import Call
from service.api.choice import Choice, Piece, TextRules
from service.api.requests import TextFields
from service.api.responses import Metrics, Usage
from service.engine.base import EngineError, GenerationRequest, SpeculationStats, TokenDelta
from service.errors import InternalError, NotReadyError, TooManyRequestsError, from_engine, refuse
from service.keys import Allowance, Key

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """Yield (index, item) as items come. The first exception ends all; closing this closes every stream.

    Each stream is run by one task from beginning to end, whichever task asks for the merged items.
    """
    queue: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((index, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_running = len(tasks)
        while num_running:
            event = await queue.get()
            if event is None:
                num_running -= 1
            elif isinstance(event, Exception):
                raise event
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def admitted(key: Key | None, num_sequences: int, now: float) -> Iterator[None]:
    """Count sequences as the key's while they run or wait. `now`: seconds of a clock.

    Raises InvalidRequestError for more than the key may ever have, TooManyRequestsError for more than it may have now.
    """
    if key is None:
        yield
        return
    if key.max_sequences is not None and num_sequences > key.max_sequences:
        refuse(
            f"n: this key may have {key.max_sequences} sequences at the same time, got {num_sequences} in one request.",
            param="n",
        )
    if key.max_sequences is not None and key.num_sequences + num_sequences > key.max_sequences:
        raise TooManyRequestsError(
            f"This key may have {key.max_sequences} sequences at the same time; it has {key.num_sequences}, and "
            f"{num_sequences} more are asked for.",
            code="key_limit",
            headers={"Retry-After": "1"},
        )
    for allowance, name in ((key.requests, "requests"), (key.tokens, "tokens")):
        seconds = 0.0 if allowance is None else allowance.seconds_until_free(now)
        if allowance is not None and seconds > 0:
            raise TooManyRequestsError(
                f"This key may have {allowance.per_minute:g} {name} a minute.",
                code="key_limit",
                headers={"Retry-After": str(math.ceil(seconds))},
            )
    _spend(key.requests, 1)
    key.num_sequences += num_sequences
    try:
        yield
    finally:
        key.num_sequences -= num_sequences


def _spend(allowance: Allowance | None, amount: int) -> None:
    if allowance is not None:
        allowance.spend(amount)


class Generation(Generic[TextFields]):
    """The sequences of one HTTP request, from admission to the last token."""

    def __init__(
        self,
        call: Call[TextFields],
        requests: Sequence[GenerationRequest],
        kept_special_tokens: frozenset[int] = frozenset(),
    ) -> None:
        """requests: one per sequence, see `make_requests`. kept_special_tokens: shown even where others are not."""
        fields = call.fields
        self.call = call
        self.text_rules = TextRules(
            stops=tuple(fields.stop or ()),
            include_stop=bool(fields.include_stop_str_in_output),
            skip_special_tokens=fields.skip_special_tokens is not False,
            kept_special_tokens=kept_special_tokens,
            min_tokens=fields.min_tokens or 0,
        )
        self.choices = [Choice(call.model.tokenizer, self.text_rules) for _ in requests]
        self._requests = requests
        self._metrics = call.serving.metrics
        self._clock = call.serving.clock
        self._record = call.record
        self._arrived = self._clock()
        self._is_prompt_read = False  # of any sequence
        self._ended = [False] * len(requests)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (index of the choice, piece). Closing it cancels what still runs. Raises ApiError."""
        with admitted(self.call.key, len(self.choices), self._clock()):
            async with aclosing(self._run()) as pieces:
                async for item in pieces:
                    yield item

    async def _run(self) -> AsyncGenerator[tuple[int, Piece], None]:
        streams = [self._sequence(index, request) for index, request in enumerate(self._requests)]
        reason = "abort"
        try:
            async with aclosing(merge(streams)) as merged:
                async for item in merged:
                    yield item
        except EngineError as error:
            reason = "error"
            raise from_engine(error) from error
        except Exception:
            reason = "error"
            raise
        finally:
            for index in range(len(self.choices)):
                self._end(index, reason)
            self._fill_record()
            if self._is_prompt_read and self.call.key is not None:
                _spend(self.call.key.tokens, self.usage()["total_tokens"])

    async def _sequence(self, index: int, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        choice = self.choices[index]
        is_first = True
        last_token: float | None = None  # seconds of the clock
        # The protocol promises `aclose`; AsyncIterator does not have it.
        async with aclosing(cast(AsyncGenerator[TokenDelta, None], self.call.model.engine.generate(request))) as deltas:
            async for delta in deltas:
                if self._record.queue_seconds is None:
                    self._record.queue_seconds = delta.queue_seconds
                if delta.finish_reason == "abort":
                    raise NotReadyError("The server is shutting down; this request was ended before it was finished.")
                if delta.finish_reason == "error":
                    raise InternalError()
                if is_first:  # the engine says nothing before it has read the prompt
                    is_first, self._is_prompt_read = False, True
                    self._metrics.observe_prompt(len(request.prompt), delta.queue_seconds)
                if request.max_tokens == 0:
                    delta = without_tokens(delta)
                piece = choice.push(delta)
                if delta.tokens:
                    last_token = self._count_tokens(len(piece.tokens), last_token)
                if choice.finish_reason is not None:
                    self._end(index, choice.finish_reason)
                yield piece
                if choice.finish_reason is not None:
                    return

    def _count_tokens(self, count: int, last_token: float | None) -> float:
        """Count tokens that came now; last_token: when those before them came. Returns the time."""
        now = self._clock()
        if last_token is None:
            self._metrics.observe_first_token(now - self._arrived)
            if self._record.first_token_seconds is None:
                self._record.first_token_seconds = now - self._arrived
        self._metrics.observe_tokens(count, None if last_token is None else now - last_token)
        return now

    def _end(self, index: int, reason: str) -> None:
        if not self._ended[index]:
            self._ended[index] = True
            self._record.finish_reasons.append(reason)
            self._metrics.observe_end(reason, self._clock() - self._arrived)

    def _fill_record(self) -> None:
        usage = self.usage()
        self._record.sequences = len(self.choices)
        self._record.prompt_tokens = usage["prompt_tokens"]
        self._record.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        self._record.completion_tokens = usage["completion_tokens"]
        self._record.speculation = self.speculation()

    def usage(self) -> Usage:
        """Return the tokens so far; a prompt counts once, however many choices it has."""
        n = self.call.fields.num_choices
        prompt = sum(len(request.prompt) for request in self._requests[::n])
        completion = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached_prompt_tokens for choice in self.choices[::n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def speculation(self) -> SpeculationStats:
        """Return the sum over all choices."""
        every = [choice.stats for choice in self.choices]
        histogram = [0] * max((len(stats.acceptance_histogram) for stats in every), default=0)
        for stats in every:
            for accepted, count in enumerate(stats.acceptance_histogram):
                histogram[accepted] += count
        return SpeculationStats(
            num_spec_steps=sum(stats.num_spec_steps for stats in every),
            num_spec_tokens=max((stats.num_spec_tokens for stats in every), default=0),
            num_draft_tokens=sum(stats.num_draft_tokens for stats in every),
            num_accepted_draft_tokens=sum(stats.num_accepted_draft_tokens for stats in every),
            acceptance_histogram=histogram,
        )

    def metrics(self) -> Metrics:
        """Return `metrics.speculative_decoding`, by vLLM's names; all zero without speculation."""
        total = self.speculation()
        steps, drafted, accepted = total.num_spec_steps, total.num_draft_tokens, total.num_accepted_draft_tokens
        missing = total.num_spec_tokens + 1 - len(total.acceptance_histogram)
        return {
            "speculative_decoding": {
                "num_spec_steps": steps,
                "num_spec_tokens": total.num_spec_tokens,
                "num_draft_tokens": drafted,
                "num_accepted_draft_tokens": accepted,
                "mean_acceptance_length": 1 + accepted / steps if steps else 0.0,
                "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
                "acceptance_histogram": total.acceptance_histogram + [0] * missing,
            }
        }


def without_tokens(delta: TokenDelta) -> TokenDelta:
    """Leave of a delta what it says about the prompt, for requests that want nothing generated."""
    is_last = bool(delta.tokens) or delta.finish_reason is not None
    return replace(
        delta, tokens=(), logprobs=(), stop_token=None, trace=None, finish_reason="length" if is_last else None
    )
