"""From a running generation to an HTTP answer, whole or as a stream. Endpoints differ only in their writer."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.body import ClientDisconnectedError
from service.api.choice import Piece
from service.api.generation import Generation
from service.api.requests import TextFields
from service.api.responses import ChatCompletion, ChatCompletionChunk, Completion
from service.errors import ApiError, InternalError
from service.logs import RequestRecord

log = logging.getLogger(__name__)

MAX_JOINED_TOKENS = 2048  # an answer with more of them is put together in another thread
DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")

# Built once: json.dumps with options makes an encoder for every call.
encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Writer(Protocol):
    """Shapes pieces as one endpoint's answers."""

    def whole(self, pieces: list[Piece]) -> Completion | ChatCompletion:
        """Return the answer, from one joined piece per choice."""

    def chunk(self, index: int, piece: Piece) -> Completion | ChatCompletionChunk | None:
        """Return one chunk of a stream; None if there is nothing to say yet."""

    def envelope(self) -> Completion | ChatCompletionChunk:
        """Return a chunk without choices, for the usage."""


async def respond(generation: Generation[TextFields], writer: Writer) -> Response:
    """Answer when all is done, or from the first piece on. Raises ApiError and ClientDisconnectedError before it."""
    receive, record = generation.call.request.receive, generation.call.record
    if not generation.call.fields.stream:
        pieces = await unless_disconnected(receive, _collect(generation))
        return JsonResponse(writer.whole(pieces), headers=_headers(record))
    source = generation.pieces()
    try:
        first = await unless_disconnected(receive, anext(source))
        return EventStream(_frames(first, source, generation, writer), source, record, _headers(record))
    except BaseException:
        await source.aclose()
        raise


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content).encode()


def _headers(record: RequestRecord) -> dict[str, str]:
    seconds = record.queue_seconds
    return {} if seconds is None else {"x-queue-time-ms": str(round(1000 * seconds))}


async def _collect(generation: Generation[TextFields]) -> list[Piece]:
    """Return all of each choice as one piece."""
    pieces: list[list[Piece]] = [[] for _ in generation.choices]
    async with aclosing(generation.pieces()) as source:
        async for index, piece in source:
            pieces[index].append(piece)
    if sum(choice.num_tokens for choice in generation.choices) > MAX_JOINED_TOKENS:
        return await asyncio.to_thread(lambda: [Piece.join(one) for one in pieces])
    return [Piece.join(one) for one in pieces]


def frame(content: Mapping[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encode_json(content).encode() + b"\n\n"


async def _frames(
    first: tuple[int, Piece],
    source: AsyncGenerator[tuple[int, Piece], None],
    generation: Generation[TextFields],
    writer: Writer,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. first: the piece that was taken from `source` already."""
    options = generation.call.fields.stream_options
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


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, or cancel it when the client goes. Raises ClientDisconnectedError then."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends frames as they come. A failure becomes a last frame with the error, and no `[DONE]` follows it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        source: AsyncGenerator[Any, None],
        record: RequestRecord,
        headers: Mapping[str, str],
    ) -> None:
        """`frames` reads `source`. Both are closed here: closing frames that never began would not close the source."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._frames = frames
        self._source = source
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source), aclosing(self._frames):
            try:
                await unless_disconnected(receive, self._send_all(send))
            except (ClientDisconnectedError, OSError):
                self._record.is_cancelled = True

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._frames:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            await self._send_error(send, error)
        except OSError:
            raise
        except Exception:
            log.exception("request %s failed while it was streamed", self._record.request_id)
            await self._send_error(send, InternalError())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, send: Send, error: ApiError) -> None:
        self._record.error = error.code or error.type
        await send({"type": "http.response.body", "body": frame(error.body()), "more_body": True})
