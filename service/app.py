"""The HTTP application: routes, errors and the life of the engine."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import VERSION
from service.api import chat, completions, models, ops
from service.api.body import ClientDisconnectedError
from service.api.middleware import CrowdMiddleware, KeyMiddleware, RequestMiddleware
from service.api.openapi import install_openapi
from service.api.respond import JsonResponse
from service.api.serving import Serving
from service.engine.base import Engine
from service.errors import ApiError, from_status
from service.keys import load_keys
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.text.tokenizer import TextTokenizer

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    engine: Engine,
    load_tokenizer: Callable[[], TextTokenizer],
    metrics: ServiceMetrics,
    *,
    on_failure: Callable[[Exception], None] = lambda error: None,
    num_connections: Callable[[], int] = lambda: 1,
    draw_seed: Callable[[], int] = lambda: random.SystemRandom().getrandbits(64),
    clock: Callable[[], float] = time.perf_counter,
    now: Callable[[], float] = time.time,
) -> FastAPI:
    """Build the application. It answers at once and loads in the background.

    on_failure: called if loading fails. num_connections: counts the open ones; only the HTTP server knows them.
    clock: measures durations, in seconds. now: Unix time.

    `app.state.serving` is for whoever runs the application: status, draining. Raises SettingsError for unusable keys.
    """
    key_ring = load_keys([key.get_secret_value() for key in settings.auth.api_keys], settings.auth.keys_file, clock)
    serving = Serving(settings, engine, load_tokenizer, metrics, key_ring, draw_seed, clock, now)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(serving, on_failure))
        try:
            yield
        finally:
            await serving.stop()
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)

    app = FastAPIOffline(  # /docs needs nothing from the network
        title="DiffuSpec",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_parameters={"tryItOutEnabled": True, "displayRequestDuration": True, "defaultModelsExpandDepth": 0},
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.serving = serving
    for module in (completions, chat, models, ops):
        app.include_router(module.router)
    app.add_middleware(KeyMiddleware, serving=serving)
    app.add_middleware(
        CrowdMiddleware, num_connections=num_connections, max_connections=settings.server.max_connections
    )
    app.add_middleware(RequestMiddleware, clock=clock, observe=metrics.observe_response)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnectedError, _answer_nobody)
    install_openapi(app, is_secured=bool(serving.key_ring.keys))
    return app


async def _load(serving: Serving, on_failure: Callable[[Exception], None]) -> None:
    try:
        await serving.start()
    except Exception as error:
        on_failure(error)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.record.error = error.code or error.type
    return JsonResponse(error.body(), status_code=error.status, headers=error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return await _answer_api_error(request, from_status(error.status_code, str(error.detail), error.headers))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """Note that the client has gone; proxies log 499 for it."""
    request.state.record.is_cancelled = True
    return Response(status_code=499)
