"""A bound on open connections, with an answer that says when to come again."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.auth import METRICS_PATH, OPEN_PATHS
from service.api.respond import JsonResponse
from service.errors import NotReadyError

RETRY_SECONDS = 1


class CrowdMiddleware:
    """Answers 503 and closes the connection while there are too many; probes and metrics are always answered."""

    def __init__(self, app: ASGIApp, num_connections: Callable[[], int], most: int) -> None:
        """num_connections: those that are open now, the asking one included."""
        self._app, self._num_connections, self._most = app, num_connections, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_bound = scope["type"] == "http" and scope["path"] not in OPEN_PATHS | {METRICS_PATH}
        if not is_bound or self._num_connections() <= self._most:
            await self._app(scope, receive, send)
            return
        error = NotReadyError(
            f"more than {self._most} connections are open: try again later.",
            code="too_many_connections",
            headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
        )
        scope["state"]["record"].error = error.code
        await JsonResponse(error.body(), status_code=error.status, headers=error.headers)(scope, receive, send)
