"""A real server on a free port, in a thread of its own, so that blocking clients can talk to it."""

import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.engine.base import Engine
from service.settings import Settings, load_settings
from service.text.tokenizer import TextTokenizer
from service.unread import cutting_off_after
from service.wiring import build_engine, build_metrics, build_tokenizer


@contextmanager
def serving(app: FastAPI, *, wait_until_ready: bool = True) -> Iterator[str]:
    """Yield the URL of `app`."""
    with running(app, wait_until_ready=wait_until_ready) as server:
        yield url_of(server)


def url_of(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@contextmanager
def running(
    app: FastAPI, listener: socket.socket | None = None, unread_seconds: float = 60.0, *, wait_until_ready: bool = True
) -> Iterator[uvicorn.Server]:
    """Yield the server of `app`, on `listener` or a free port."""
    http = cutting_off_after(unread_seconds)
    config = uvicorn.Config(
        app, port=0, http=http, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    sockets = None if listener is None else [listener]
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    try:
        _wait_for(lambda: server.started, 30)
        if wait_until_ready:
            # numba may have to compile, and vLLM starts two processes that import it again
            _wait_for(lambda: httpx.get(url_of(server) + "/ready").status_code == 200, 600)
        yield server
    finally:
        server.should_exit = True
        thread.join(30)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.02)


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Fail unless `condition` holds within `seconds`."""
    _wait_for(condition, seconds)


def embedded_app(target: Path, drafter: Path, **overrides: Any) -> FastAPI:
    """The application as `diffuspec serve` builds it, over tiny models."""
    return engine_app("embedded", target, drafter, **overrides)


def engine_app(engine: str, target: Path, drafter: Path, **overrides: Any) -> FastAPI:
    """The same for any engine."""
    settings = load_settings(
        overrides={
            "model.engine": engine,
            "model.target": str(target),
            "model.drafter": str(drafter),
            "model.num_threads": 1,
            "model.served_model_name": "tiny",
            **overrides,
        }
    )
    metrics = build_metrics(settings)
    built, load_tokenizer = build_engine(settings, metrics)
    return create_app(settings, built, load_tokenizer, metrics)


def scripted_app(engine: Engine, target: Path, settings: Settings | None = None, **options: Any) -> FastAPI:
    """An application over any engine, with the tiny target's tokenizer."""
    settings = settings or load_settings(overrides={"model.served_model_name": "tiny"})
    load_tokenizer: Callable[[], TextTokenizer] = options.pop(
        "load_tokenizer", functools.partial(build_tokenizer, target)
    )
    return create_app(settings, engine, load_tokenizer, build_metrics(settings), **options)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, in the one shape there is."""
    content = answer.json()
    assert set(content) == {"error"}
    error: dict[str, Any] = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    return error


def post(url: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """The answer to a body that must be right."""
    answer = httpx.post(url + path, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content
