"""Around every request: its id, time and line in the log; the bound on open connections; the API keys."""

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.respond import JsonResponse
from service.api.serving import Serving
from service.errors import ApiError, AuthenticationError, InternalError, NotReadyError
from service.logs import RequestRecord, log_request

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/startup"})  # probes need no key
METRICS_PATH = "/metrics"
UNKNOWN_ROUTE = "unknown"
PLAIN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
RETRY_SECONDS = 1


class RequestMiddleware:
    """Gives every request an id and a record, logs and counts it, and answers 500 to unforeseen exceptions."""

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
            await _answer(InternalError(), scope, receive, send_with_headers)
        finally:
            record.seconds = self._clock() - started
            log_request(record)
            if record.status:
                self._observe(getattr(scope.get("route"), "path", UNKNOWN_ROUTE), record.status)


class CrowdMiddleware:
    """Answers 503 and closes the connection while too many are open; probes and metrics are always answered."""

    def __init__(self, app: ASGIApp, num_connections: Callable[[], int], max_connections: int) -> None:
        """num_connections: those that are open now, this request's own included."""
        self._app = app
        self._num_connections = num_connections
        self._max_connections = max_connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_bounded = scope["type"] == "http" and scope["path"] not in OPEN_PATHS | {METRICS_PATH}
        if not is_bounded or self._num_connections() <= self._max_connections:
            await self._app(scope, receive, send)
            return
        error = NotReadyError(
            f"More than {self._max_connections} connections are open: try again later.",
            code="too_many_connections",
            headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
        )
        await _answer(error, scope, receive, send)


class KeyMiddleware:
    """Asks for an API key where there are keys, on every route but the probes.

    Sets `scope["state"]["key"]` to the key that came, or to None where none is asked for.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app = app
        self._serving = serving
        is_open = serving.settings.auth.open_metrics
        self._open_paths = OPEN_PATHS | {METRICS_PATH} if is_open else OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["key"] = None
            ring = self._serving.key_ring
            if ring.keys and scope["path"] not in self._open_paths:
                key = ring.find(_given_key(scope), self._serving.now())
                if key is None:
                    error = AuthenticationError(
                        "Send one of this server's API keys, not expired, as Authorization: Bearer KEY.",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
                    await _answer(error, scope, receive, send)
                    return
                scope["state"]["key"] = key
                scope["state"]["record"].key = key.name
        await self._app(scope, receive, send)


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"]["record"].error = error.code
    await JsonResponse(error.body(), status_code=error.status, headers=error.headers)(scope, receive, send)


def _request_id(scope: Scope) -> str:
    """Return the client's own id if it is short and plain, else a new one. It is only shown and logged."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if PLAIN_ID.fullmatch(given) else uuid.uuid4().hex


def _given_key(scope: Scope) -> str:
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""
