"""Server-sent events, and noticing that the client has gone."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.body import ClientDisconnectedError
from service.errors import ApiError, InternalError
from service.logs import RequestRecord

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"

# Built once: json.dumps with options makes an encoder for every call.
encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def frame(content: Mapping[str, Any]) -> bytes:
    return b"data: " + encode_json(content).encode() + b"\n\n"


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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
        """`source` is what `frames` reads: closed here too, as closing frames that never began would not do it."""
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
