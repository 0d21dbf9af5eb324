"""From a running generation to an HTTP answer, whole or as a stream; completions and chats differ only in a writer."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from service.api.choice import Piece
from service.api.generation import Generation
from service.api.responses import ChatCompletion, ChatCompletionChunk, Completion
from service.api.schemas import GenerationFields
from service.api.sse import DONE, EventStream, encode_json, frame, unless_disconnected


class Writer(Protocol):
    """Shapes pieces as one endpoint's answers."""

    def whole(self, pieces: list[Piece]) -> Completion | ChatCompletion:
        """The answer, from one joined piece per choice."""

    def chunk(self, index: int, piece: Piece) -> Completion | ChatCompletionChunk | None:
        """One chunk of a stream; None if there is nothing to say yet."""

    def envelope(self) -> Completion | ChatCompletionChunk:
        """A chunk without choices, for the usage."""


async def respond(request: Request, fields: GenerationFields, generation: Generation, writer: Writer) -> Response:
    """Answer when all is done, or from the first piece on. Raises ApiError and ClientDisconnectedError before it."""
    if not fields.stream:
        pieces = await unless_disconnected(request.receive, _collect(generation))
        return JsonResponse(writer.whole(pieces), headers=_headers(request))
    source = generation.pieces()
    try:
        first = await unless_disconnected(request.receive, anext(source))
        frames = _frames(first, source, fields, generation, writer)
        return EventStream(frames, source, request.state.record, _headers(request))
    except BaseException:
        await source.aclose()
        raise


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content).encode()


def _headers(request: Request) -> dict[str, str]:
    seconds = request.state.record.queue_seconds
    return {} if seconds is None else {"x-queue-time-ms": str(round(1000 * seconds))}


async def _collect(generation: Generation) -> list[Piece]:
    parts: list[list[Piece]] = [[] for _ in generation.choices]
    async with aclosing(generation.pieces()) as source:
        async for index, piece in source:
            parts[index].append(piece)
    if sum(choice.num_tokens for choice in generation.choices) > 2048:  # long: not on the event loop
        return await asyncio.to_thread(lambda: [Piece.join(part) for part in parts])
    return [Piece.join(part) for part in parts]


async def _frames(
    first: tuple[int, Piece],
    source: AsyncGenerator[tuple[int, Piece], None],
    fields: GenerationFields,
    generation: Generation,
    writer: Writer,
) -> AsyncGenerator[bytes, None]:
    options = fields.stream_options
    wants_usage = options is not None and bool(options.include_usage)
    is_continuous = options is not None and bool(options.continuous_usage_stats)

    def write(index: int, piece: Piece) -> bytes:
        chunk = writer.chunk(index, piece)
        if chunk is None:
            return b""
        if is_continuous:
            chunk["usage"] = generation.usage()
        elif wants_usage:
            chunk["usage"] = None
        return frame(chunk)

    if data := write(*first):
        yield data
    async for index, piece in source:
        if data := write(index, piece):
            yield data
    if wants_usage:
        last = writer.envelope()
        last["usage"], last["metrics"] = generation.usage(), generation.metrics()
        yield frame(last)
    yield DONE
