"""Running all sequences of one HTTP request: merged into one stream, counted, and cleaned up on one path."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar, cast

from service.api.choice import Choice, Piece
from service.api.parameters import Plan
from service.api.quota import admitted, charge
from service.api.responses import Metrics, Usage
from service.api.serving import ServedModel, Serving
from service.engine.base import EngineError, GenerationRequest, SpeculationStats, TokenDelta
from service.errors import ApiError, InternalError, NotReadyError, from_engine
from service.keys import Key
from service.logs import RequestRecord

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


class Generation:
    """The sequences of one HTTP request, from admission to the last token."""

    def __init__(
        self,
        serving: Serving,
        model: ServedModel,
        plan: Plan,
        record: RequestRecord,
        response_id: str,
        key: Key | None = None,
    ) -> None:
        self.plan = plan
        self.tokenizer = model.tokenizer
        self._engine = model.engine
        self._metrics = serving.metrics
        self._clock = serving.clock
        self._record = record
        self._key = key
        self._requests = plan.requests(response_id)
        self.choices = [Choice(model.tokenizer, plan.text_rules) for _ in self._requests]
        self._arrived = self._clock()
        self._ended = [False] * len(self.choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (index of the choice, piece). Closing it cancels what still runs. Raises ApiError."""
        with admitted(self._key, len(self.choices), self._clock()):
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
            if self._record.first_token_seconds is not None:
                charge(self._key, self.usage()["total_tokens"])

    async def _sequence(self, index: int, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        choice = self.choices[index]
        last: float | None = None
        # The protocol promises `aclose`; AsyncIterator does not have it.
        async with aclosing(cast(AsyncGenerator[TokenDelta, None], self._engine.generate(request))) as deltas:
            async for delta in deltas:
                if self._record.queue_seconds is None:
                    self._record.queue_seconds = delta.queue_seconds
                if delta.finish_reason in ("abort", "error"):
                    raise self._ended_early(delta)
                if self._wants_only_prompt(index):
                    delta = without_tokens(delta)
                piece = choice.push(delta)
                if delta.tokens:
                    last = self._count(request, delta, len(piece.tokens), last)
                if choice.finish_reason is not None:
                    self._end(index, choice.finish_reason)
                yield piece
                if choice.finish_reason is not None:
                    return

    def _wants_only_prompt(self, index: int) -> bool:
        return self.plan.max_tokens[index // self.plan.n] == 0

    def _ended_early(self, delta: TokenDelta) -> ApiError:
        if delta.finish_reason == "abort":
            return NotReadyError("The server is shutting down; this request was ended before it was finished.")
        return InternalError()

    def _count(self, request: GenerationRequest, delta: TokenDelta, num_tokens: int, last: float | None) -> float:
        now = self._clock()
        if last is None:
            self._metrics.observe_first_token(len(request.prompt), delta.queue_seconds, now - self._arrived)
            if self._record.first_token_seconds is None:
                self._record.first_token_seconds = now - self._arrived
        self._metrics.observe_tokens(num_tokens, None if last is None else now - last)
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
        """Tokens so far; a prompt counts once, however many choices it has."""
        prompt = sum(len(prompt.tokens) for prompt in self.plan.prompts)
        completion = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached_prompt_tokens for choice in self.choices[:: self.plan.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def speculation(self) -> SpeculationStats:
        """The sum over all choices."""
        parts = [choice.stats for choice in self.choices]
        length = max((len(part.acceptance_histogram) for part in parts), default=0)
        histogram = [0] * length
        for part in parts:
            for accepted, count in enumerate(part.acceptance_histogram):
                histogram[accepted] += count
        return SpeculationStats(
            num_spec_steps=sum(part.num_spec_steps for part in parts),
            num_spec_tokens=max((part.num_spec_tokens for part in parts), default=0),
            num_draft_tokens=sum(part.num_draft_tokens for part in parts),
            num_accepted_draft_tokens=sum(part.num_accepted_draft_tokens for part in parts),
            acceptance_histogram=histogram,
        )

    def metrics(self) -> Metrics:
        """`metrics.speculative_decoding`, by vLLM's names; all zero without speculation."""
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
    """The prompt's part of a delta, for requests that want nothing generated."""
    is_last = bool(delta.tokens) or delta.finish_reason is not None
    return replace(
        delta, tokens=(), logprobs=(), stop_token=None, trace=None, finish_reason="length" if is_last else None
    )
