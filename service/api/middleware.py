"""Around every request: its id, its time, its line in the log, and an answer even to what nobody foresaw."""

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.respond import JsonResponse
from service.errors import InternalError
from service.logs import RequestRecord, log_request

log = logging.getLogger(__name__)

UNKNOWN_ROUTE = "unknown"
PLAIN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class RequestMiddleware:
    def __init__(self, app: ASGIApp, clock: Callable[[], float], observe: Callable[[str, int], None]) -> None:
        """`observe` gets the pattern of the route and the status of every response."""
        self._app = app
        self._clock = clock
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = self._clock()
        record = RequestRecord(_request_id(scope), scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                headers["openai-processing-ms"] = str(round(1000 * (self._clock() - started)))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request %s failed", record.request_id)
            if record.status:  # too late for another answer: the connection is cut
                raise
            error = InternalError()
            record.error = error.code
            await JsonResponse(error.body(), status_code=error.status)(scope, receive, send_with_headers)
        finally:
            record.seconds = self._clock() - started
            log_request(record)
            if record.status:
                self._observe(getattr(scope.get("route"), "path", UNKNOWN_ROUTE), record.status)


def _request_id(scope: Scope) -> str:
    """The client's own id if it is short and plain, else a new one. It is shown and logged, never interpreted."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if PLAIN_ID.fullmatch(given) else uuid.uuid4().hex
