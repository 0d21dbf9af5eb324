"""Who may come in."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.respond import JsonResponse
from service.api.serving import Serving
from service.errors import AuthenticationError

OPEN_PATHS = frozenset({"/health", "/ready", "/startup"})  # what probes ask
METRICS_PATH = "/metrics"


class KeyMiddleware:
    """Lets nobody in without a key where there are keys, on every route but those that probes ask.

    What it finds is `scope["state"]["key"]`: the key, or None where none is asked for.
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
                key = ring.find(_given(scope), self._serving.now())
                if key is None:
                    await _refuse(scope, receive, send)
                    return
                scope["state"]["key"] = key
                scope["state"]["record"].key = key.name
        await self._app(scope, receive, send)


def _given(scope: Scope) -> str:
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = AuthenticationError("Send one of this server's API keys, not expired, as Authorization: Bearer KEY.")
    scope["state"]["record"].error = error.code
    answer = JsonResponse(error.body(), status_code=error.status, headers={"WWW-Authenticate": "Bearer"})
    await answer(scope, receive, send)
