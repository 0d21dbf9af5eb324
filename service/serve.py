"""`diffuspec serve`: run the server, show the progress of loading, and drain on SIGTERM."""

import asyncio
import json
import logging
import shlex
import signal
import socket
import ssl
from types import FrameType
from typing import TextIO

import uvicorn

from service.api.serving import Serving
from service.app import create_app
from service.logs import configure_logging
from service.preflight import check_models, refuse_gguf
from service.setting_groups import ServerSettings
from service.settings import Settings
from service.unread import cutting_off_after
from service.wiring import build_engine, build_metrics
from transformer.config import CheckpointError

log = logging.getLogger(__name__)

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"
EXAMPLE = json.dumps({"prompt": PROMPT, "max_tokens": 64, "temperature": 0.4, "seed": 1})
BAR_WIDTH = 24
POLL_SECONDS = 0.1
LAST_ANSWERS_SECONDS = 1.0  # from the engine's death to the server's end, for the last answers
CLOSING_SECONDS = 5  # for connections to close, once all requests have ended


def serve(settings: Settings, output: TextIO) -> int:
    """Serve until a signal comes. Returns the exit status: 1 if the address or the model can't be used."""
    configure_logging(settings.logging.format, settings.logging.level)
    try:
        if settings.model.engine == "embedded":
            check_models(settings)
        else:
            refuse_gguf(settings.model.target)
    except CheckpointError as error:
        print(f"diffuspec: cannot load the model: {error}", file=output)
        return 1
    try:
        listener = _listen(settings.server.host, settings.server.port)
    except OSError as error:
        address = f"{settings.server.host}:{settings.server.port}"
        print(f"diffuspec: cannot listen on {address}: {error.strerror or error}; try another --port.", file=output)
        return 1
    with listener:
        problem = _tls_problem(settings.server)
        if problem:
            print(f"diffuspec: cannot use the TLS certificate: {problem}.", file=output)
            return 1
        return asyncio.run(_serve(settings, listener, output))


def _tls_problem(server: ServerSettings) -> str:
    """Return why the certificate and its key can't be used; empty if they can, or if there is none."""
    if server.tls_certificate is None:
        return ""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.tls_certificate, server.tls_key)
    except OSError as error:  # ssl.SSLError is one
        return error.strerror or str(error)
    return ""


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    # Every connection inherits this. asyncio sets it only on sockets that name their protocol, and without it a
    # streamed chunk may wait 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def _serve(settings: Settings, listener: socket.socket, output: TextIO) -> int:
    metrics = build_metrics(settings)
    engine, load_tokenizer = build_engine(settings, metrics)
    app = create_app(
        settings,
        engine,
        load_tokenizer,
        metrics,
        on_failure=lambda error: server.end(),
        num_connections=lambda: len(server.server_state.connections),
    )
    serving: Serving = app.state.serving
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=settings.server.keep_alive_seconds,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        server_header=False,
        ws="none",  # WebSocket connections would bypass keys, limits and the log
        http=cutting_off_after(settings.server.unread_seconds),  # h11, which limits the head of a request
        h11_max_incomplete_event_size=settings.server.max_header_bytes,
        ssl_certfile=settings.server.tls_certificate,
        ssl_keyfile=settings.server.tls_key,
    )
    server = DrainingServer(config, serving)
    watching = asyncio.create_task(_end_with_engine(serving, server))
    announcing = asyncio.create_task(_announce(settings, serving, url_of(settings, listener), output))
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in (announcing, watching):
            task.cancel()
        await asyncio.gather(announcing, watching, return_exceptions=True)
    if serving.failure is not None:
        print(f"diffuspec: cannot load the model: {_sentence(serving.failure)}", file=output)
        return 1
    if server.has_lost_engine:
        print("diffuspec: the engine has died; the log says why.", file=output)
        return 1
    return 0


async def _end_with_engine(serving: Serving, server: "DrainingServer") -> None:
    """End the server after the engine died, which never comes back: send the last answers, then let us be restarted."""
    while not (serving.is_loaded and serving.status().phase == "dead"):  # noqa: ASYNC110  # a state, not an event
        await asyncio.sleep(POLL_SECONDS)
    log.critical("the engine has died: the server ends")
    server.has_lost_engine = True
    await asyncio.sleep(LAST_ANSWERS_SECONDS)
    server.end()


class DrainingServer(uvicorn.Server):
    """Keeps listening while it drains, so that probes and new requests get an answer. A second signal ends at once."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.has_lost_engine = False

    def end(self) -> None:
        """Stop serving as soon as possible."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._on_signal, sig)

    def _on_signal(self, sig: int) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        log.info("%s: draining", signal.Signals(sig).name)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._serving.stop()
        self.end()


def url_of(settings: Settings, listener: socket.socket) -> str:
    """Return the URL under which a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.server.host, settings.server.host)
    scheme = "http" if settings.server.tls_certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


async def _announce(settings: Settings, serving: Serving, url: str, output: TextIO) -> None:
    """Print the progress of loading, then the banner."""
    shown = ""
    while (status := serving.status()).phase == "loading":
        detail = status.detail or "reading the tokenizer"
        if output.isatty():
            filled = round(BAR_WIDTH * status.progress)
            print(f"\r\x1b[K[{'#' * filled:-<{BAR_WIDTH}}] {detail}", end="", file=output, flush=True)
        elif detail != shown:
            print(f"diffuspec: {detail}", file=output, flush=True)
        shown = detail
        await asyncio.sleep(POLL_SECONDS)
    if output.isatty():
        print("\r\x1b[K", end="", file=output)
    if status.phase == "ready":
        print(banner(settings, serving, url), file=output, flush=True)


def banner(settings: Settings, serving: Serving, url: str) -> str:
    """Describe what is served, with a command to try it."""
    engine = serving.model(None).engine
    key = ' -H "Authorization: Bearer $API_KEY"' if serving.key_ring.keys else ""
    drafting = f"{engine.drafter_description}"
    if engine.default_draft_tokens:
        drafting += f"; {settings.speculation.policy} policy, at most {engine.default_draft_tokens} tokens"
    return (
        f"\nDiffuSpec is ready on {url} after {serving.seconds_since_start:.1f} s\n"
        f"  model    {serving.name}, {engine.context_length} tokens of context\n"
        f"  target   {settings.model.target}\n"
        f"  drafter  {drafting}\n"
        f"  try it   curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(EXAMPLE)}\n"
        f"  or       diffuspec complete --url {url} 'def read_lines(path):'\n"
        f"  API      {url}/docs\n"
    )


def _sentence(error: Exception) -> str:
    """Return an error's message, with its type unless it is one of ours, which are written for people."""
    return str(error) if type(error).__module__.split(".")[0] in _OURS else f"{type(error).__name__}: {error}"


_OURS = frozenset({"service", "drafters", "verifiers", "transformer"})
