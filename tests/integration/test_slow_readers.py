"""Clients that read slowly, or not at all: what they are sent is bounded, and they are not waited for forever."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from service.engine.base import GenerationRequest, TokenDelta
from service.unread import progress
from tests.integration.api_server import running, scripted_app, url_of, wait_for
from tests.integration.raw_client import begin
from tests.integration.scripted_engine import ScriptedEngine, Step, deltas

HIGH_WATER = 64 << 10  # of asyncio's transports: beyond it whoever writes has to wait
MAX_FRAME = 4096


@contextmanager
def serving(engine: ScriptedEngine, target: Path, unread_seconds: float) -> Iterator[uvicorn.Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # or the kernel would buffer megabytes
        with running(scripted_app(engine, target), listener, unread_seconds) as server:
            yield server


@contextmanager
def streaming(server: uvicorn.Server) -> Iterator[socket.socket]:
    """A connection on which a stream has begun, with little room for what is not read."""
    with begin(url_of(server), {"prompt": "x", "stream": True, "max_tokens": 500}, room=16384) as client:
        assert client.recv(12) == b"HTTP/1.1 200"
        yield client


def endless(_: GenerationRequest) -> Iterator[Step]:
    while True:
        yield TokenDelta(tokens=(97,) * 64)
        yield 0.002


def test_a_client_that_reads_nothing_is_cut_off_and_a_slow_one_is_not(tiny_target: Path) -> None:
    engine = ScriptedEngine(endless)
    with serving(engine, tiny_target, unread_seconds=1.5) as server, streaming(server) as slow:
        with streaming(server):
            deadline = time.monotonic() + 20
            while not engine.ended:
                assert slow.recv(1024)
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert list(engine.ended.values()) == ["cancelled"]
        assert [request.request_id for request in engine.seen[1:]] == list(engine.ended)
        for _ in range(50):
            assert slow.recv(1024)
            time.sleep(0.05)
        assert len(engine.ended) == 1


@pytest.mark.parametrize("is_listening", [True, False])
def test_what_waits_for_a_reader_is_bounded_and_no_sequence_waits_with_it(
    tiny_target: Path, is_listening: bool
) -> None:
    """The sequence has ended long before its reader has all of it; then it comes in full, or not at all."""
    engine = ScriptedEngine(lambda request: deltas("a" * 4000, sizes=[1] * 3999))
    with serving(engine, tiny_target, unread_seconds=60 if is_listening else 0.5) as server:
        with streaming(server) as client:
            wait_for(lambda: list(engine.ended.values()) == ["finished"])
            (connection,) = server.server_state.connections
            buffered = connection.transport.get_write_buffer_size  # type: ignore[union-attr]
            wait_for(lambda: buffered() > HIGH_WATER // 2)
            for _ in range(20):
                assert buffered() <= HIGH_WATER + MAX_FRAME
                time.sleep(0.01)
            if is_listening:
                received = b""
                while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                    received += client.recv(1 << 16)
                assert received.count(b'"text":"a"') == 4000
            else:
                wait_for(lambda: not server.server_state.connections)
        wait_for(lambda: not server.server_state.tasks)


def test_for_a_closed_connection_nothing_waits() -> None:
    connection = socket.socket()
    connection.close()
    assert progress(connection) is None
