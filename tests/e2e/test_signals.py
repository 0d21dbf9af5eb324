"""The server survives a supervisor: SIGTERM at any moment, SIGSTOP and SIGCONT, a log that can't be written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, wait_until_ready
from tests.integration.api_server import wait_for

LONG: dict[str, Any] = {"prompt": "x", "temperature": 0, "ignore_eos": True, "max_tokens": 400}
ENDLESS_STREAMS = 16  # of LONG requests; they take longer than the tests wait
LAST_STEP_SECONDS = 10  # beyond the drain's limit: for a step and the last answers, on a busy machine


@dataclass
class Process:
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    http: httpx.Client  # shared, because a client per request would be slow to start
    streams: list[str] = field(default_factory=list)  # the texts of ended streams

    def stream(self, body: dict[str, Any]) -> str:
        with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            text = "".join(answer.iter_text())
        self.streams.append(text)
        return text

    def text(self, body: dict[str, Any]) -> str:
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def num_running(self) -> int:
        lines = self.http.get("/metrics").text.splitlines()
        line = next(line for line in lines if line.startswith("vllm:num_requests_running{"))
        return int(float(line.split()[-1]))

    def seconds_until_end(self) -> float:
        started = time.monotonic()
        self.process.wait(60)
        return time.monotonic() - started


@contextmanager
def serve(
    target: Path,
    drafter: Path,
    port: int,
    log: Path,
    stderr: int | None = None,
    ready: bool = True,
    **env: str,
) -> Iterator[Process]:
    command = [sys.executable, "-m", "service.cli", "serve", "--threads", "1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--target", str(target), "--drafter", str(drafter)],
            cwd=ROOT,
            stdout=output,
            stderr=output if stderr is None else stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        if ready:
            wait_until_ready(url, process)
        with httpx.Client(base_url=url, timeout=60) as http:
            yield Process(url, process, log, http)
    finally:
        process.kill()
        process.wait()


@contextmanager
def under_load(server: Process) -> Iterator[ThreadPoolExecutor]:
    """Begin streams of LONG requests, and wait for their end on exit."""
    with ThreadPoolExecutor(ENDLESS_STREAMS) as clients:
        streams = [clients.submit(server.stream, LONG | {"prompt": f"x{i}"}) for i in range(ENDLESS_STREAMS)]
        wait_for(lambda: server.num_running() == ENDLESS_STREAMS)
        yield clients
        for stream in streams:
            stream.exception()


def test_a_stopped_process_goes_on_and_sigterm_lets_running_requests_finish(
    tiny_target: Path, tiny_drafter: Path, unused_port: int, tmp_path: Path
) -> None:
    with serve(tiny_target, tiny_drafter, unused_port, tmp_path / "log") as server:
        expected = server.text(LONG)
        with ThreadPoolExecutor(1) as clients:
            stopped = clients.submit(server.text, LONG)
            wait_for(lambda: server.num_running() == 1)
            server.process.send_signal(signal.SIGSTOP)
            with pytest.raises(httpx.TimeoutException):
                httpx.get(server.url + "/health", timeout=0.5)
            server.process.send_signal(signal.SIGCONT)
            assert stopped.result() == expected
        with under_load(server):
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(server.url + "/ready").status_code == 503)
            assert httpx.get(server.url + "/health").status_code == 200
            refused = httpx.post(server.url + "/v1/completions", json=LONG)
            assert refused.status_code == 503
            assert "draining" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"]
        assert len(server.streams) == ENDLESS_STREAMS
        for text in server.streams:
            assert text.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length"' in text
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


def test_a_drain_that_takes_too_long_ends_with_an_error_for_each(
    tiny_target: Path, tiny_drafter: Path, unused_port: int, tmp_path: Path
) -> None:
    env = {"DIFFUSPEC_SERVER__DRAIN_SECONDS": "0.2"}
    with serve(tiny_target, tiny_drafter, unused_port, tmp_path / "log", **env) as server:
        with under_load(server):
            server.process.send_signal(signal.SIGTERM)
            assert server.seconds_until_end() < 0.2 + LAST_STEP_SECONDS
        assert server.process.returncode == 0
        assert len(server.streams) == ENDLESS_STREAMS
        ends = [text.endswith("data: [DONE]\n\n") or "shutting down" in text for text in server.streams]
        assert all(ends)
        assert any("shutting down" in text for text in server.streams)
        assert "Traceback" not in server.log.read_text()


def test_a_second_signal_does_not_wait(tiny_target: Path, tiny_drafter: Path, unused_port: int, tmp_path: Path) -> None:
    with serve(tiny_target, tiny_drafter, unused_port, tmp_path / "log") as server:
        with under_load(server):
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(server.url + "/ready").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            assert server.seconds_until_end() < LAST_STEP_SECONDS
        assert server.process.returncode == 0
        assert any("[DONE]" not in text for text in server.streams) or len(server.streams) < ENDLESS_STREAMS


def test_a_signal_while_loading_ends_the_process(
    tiny_target: Path, tiny_drafter: Path, unused_port: int, tmp_path: Path
) -> None:
    with serve(tiny_target, tiny_drafter, unused_port, tmp_path / "log", ready=False) as server:

        def is_listening() -> bool:
            try:
                return httpx.get(server.url + "/startup", timeout=5).json()["phase"] == "loading"
            except httpx.TransportError:
                return False

        wait_for(is_listening, 60)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
def test_a_log_that_cannot_be_written_hurts_nobody(
    tiny_target: Path, tiny_drafter: Path, unused_port: int, tmp_path: Path, kind: str
) -> None:
    if kind == "full disk":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        unread, stderr = os.pipe()
        os.close(unread)
    try:
        with serve(tiny_target, tiny_drafter, unused_port, tmp_path / "log", stderr) as server:
            first = server.text(LONG)
            assert server.text(LONG | {"speculative": {"enabled": False}}) == first
            assert httpx.post(server.url + "/v1/completions", json={"prompt": 1.5}).status_code == 400
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(30) == 0
    finally:
        os.close(stderr)
