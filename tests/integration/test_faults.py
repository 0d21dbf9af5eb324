"""Faults stay contained: other requests get plain decoding's output, and nothing leaks."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.sequence import Decoding
from service.logs import JsonFormatter, TextFormatter
from tests.faulty import Fault
from tests.integration.api_server import wait_for
from tests.integration.faulty_server import HEADERS, MAX_RUNNING, FaultyServer, faulty_server, tokens_of
from tests.integration.raw_client import begin, hang_up, read_frames

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": 48}
SAMPLED: dict[str, Any] = GREEDY | {"temperature": 0.9, "top_p": 0.95, "seed": 11}
NEIGHBOURS = [
    GREEDY | {"prompt": "a neighbour"},
    SAMPLED | {"prompt": "another"},
    GREEDY | {"prompt": "x" * 120, "max_tokens": 20},
]
LONG = 300  # tokens; such a request still runs when its client leaves


@pytest.fixture(scope="module")
def faulty(tiny_target: Path, tiny_drafter: Path) -> Iterator[FaultyServer]:
    with faulty_server(tiny_target, tiny_drafter, **{"scheduler.hang_seconds": 1.0}) as server:
        for body in NEIGHBOURS:
            server.plain(body)
        yield server


@pytest.fixture(autouse=True)
def calm(faulty: FaultyServer) -> Iterator[None]:
    yield
    faulty.drafter.plant("none")
    faulty.drafter.release()
    faulty.pace.go()


def assert_plain(faulty: FaultyServer, bodies: list[dict[str, Any]] = NEIGHBOURS) -> None:
    answers = [(body, faulty.start(body)) for body in bodies]
    for body, answer in answers:
        assert tokens_of(answer.result()) == faulty.plain(body)


def wait_until_up(faulty: FaultyServer) -> None:
    """Decode until the drafter has been tried again and works."""
    faulty.drafter.plant("none")
    faulty.drafter.num_faults = 0
    faulty.pipeline._backoff.end()
    assert tokens_of(faulty.post(NEIGHBOURS[0])) == faulty.plain(NEIGHBOURS[0])
    assert faulty.metric("diffuspec_drafter_up") == 1


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_drafter_that_fails_costs_drafts_and_comes_back(
    faulty: FaultyServer, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    failures = faulty.metric("diffuspec_drafter_failures_total")
    with faulty.ending(length=6):
        assert_plain(faulty)
        assert faulty.metric("diffuspec_drafter_up") == 1
        faulty.drafter.plant(fault)
        assert_plain(faulty)
        assert faulty.metric("diffuspec_drafter_up") == 0
        assert faulty.metric("diffuspec_drafter_failures_total") == failures + faulty.drafter.num_faults > failures
    assert "the diffusion drafter failed" in caplog.text
    wait_until_up(faulty)
    with faulty.ending(length=3):
        assert_plain(faulty)


def test_a_drafter_that_fails_in_mid_stream_is_not_seen_by_the_reader(faulty: FaultyServer) -> None:
    body = SAMPLED | {"prompt": "a stream", "max_tokens": 60}
    expected = faulty.plain(body)
    wait_until_up(faulty)
    tokens: list[int] = []
    with faulty.ending(length=1):
        faulty.pace.seconds = 0.005
        with faulty.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    tokens += httpx.Response(200, content=line[6:]).json()["choices"][0]["token_ids"]
                    if len(tokens) > 10:
                        faulty.drafter.plant("raises")
    assert tokens == expected
    assert faulty.drafter.num_faults > 0
    wait_until_up(faulty)


def test_a_drafter_that_stalls_makes_the_probes_fail_until_it_goes_on(faulty: FaultyServer) -> None:
    """Clients that leave meanwhile are released; those that wait get plain decoding's output."""
    with faulty.ending(length=3, abort=2):
        faulty.drafter.plant("stalls")
        answers = [(body, faulty.start(body)) for body in NEIGHBOURS]
        gone = GREEDY | {"prompt": "gone"}
        leaving = [begin(faulty.url, gone | {"stream": stream}, headers=HEADERS) for stream in (False, True)]
        wait_for(lambda: faulty.http.get("/ready").status_code == 503)
        health = faulty.http.get("/health")
        assert health.status_code == 503
        assert health.json()["error"]["code"] == "engine_hung"
        assert faulty.metric("diffuspec_engine_phase", phase="hung") == 1
        assert faulty.post(NEIGHBOURS[0]).status_code == 503
        for client in leaving:
            hang_up(client, politely=True)
        faulty.drafter.fault = "none"
        faulty.drafter.release()
        for body, answer in answers:
            assert tokens_of(answer.result()) == faulty.plain(body)
        wait_for(lambda: faulty.http.get("/health").status_code == 200)


BUSY = [GREEDY | {"prompt": f"busy {i}", "max_tokens": 30} for i in range(MAX_RUNNING)]


@pytest.mark.parametrize(("n", "stream", "politely"), [(1, False, 1), (1, True, 0), (3, False, 0), (3, True, 1)])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a_client_that_leaves_takes_nothing_along(
    faulty: FaultyServer, phase: str, n: int, stream: bool, politely: int
) -> None:
    prompt = "p" * 200 if phase == "prefill" else "leaving"
    body = SAMPLED | {"prompt": prompt, "max_tokens": LONG, "n": n, "stream": stream}
    neighbours = BUSY if phase == "queue" else NEIGHBOURS[:1]
    expected = [faulty.plain(one) for one in neighbours]

    def mine() -> list[Decoding]:
        return [one for one in faulty.decodings() if one.request.max_tokens == LONG]

    with faulty.ending(length=len(neighbours), abort=n):
        faulty.pace.seconds = 0.01
        answers = [faulty.start(one) for one in neighbours]
        wait_for(lambda: faulty.metric("vllm:num_requests_running") == len(neighbours))
        if phase == "queue":
            faulty.pace.hold()
        client = begin(faulty.url, body, headers=HEADERS)
        if phase == "queue":
            wait_for(lambda: faulty.metric("vllm:num_requests_waiting") == n)
        elif phase == "prefill":
            wait_for(lambda: any(one.num_cached for one in mine()))
            faulty.pace.hold()
            assert all(one.is_reading for one in mine())
        else:
            wait_for(lambda: any(one.length > one.num_prompt + 2 for one in mine()))
            faulty.pace.hold()
        gone, lengths = mine(), [one.length for one in mine()]
        hang_up(client, politely=bool(politely))
        wait_for(lambda: len(faulty.engine._streams) <= len(neighbours))
        faulty.pace.go()
        assert [tokens_of(answer.result()) for answer in answers] == expected
    assert len(gone) == n
    assert all(one.length <= length + 5 for one, length in zip(gone, lengths, strict=True))  # the step in progress


@pytest.mark.parametrize("politely", [True, False], ids=["closed", "reset"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_reader_that_leaves_between_frames_takes_nothing_along(faulty: FaultyServer, n: int, politely: bool) -> None:
    faulty.pace.seconds = 0.004
    with faulty.ending(length=1, abort=n):
        answer = faulty.start(NEIGHBOURS[0])
        client = begin(
            faulty.url, SAMPLED | {"prompt": "x", "max_tokens": LONG, "n": n, "stream": True}, headers=HEADERS
        )
        read_frames(client, 4)
        gone = [one for one in faulty.decodings() if one.request.max_tokens == LONG]
        hang_up(client, politely=politely)
        assert tokens_of(answer.result()) == faulty.plain(NEIGHBOURS[0])
    assert len(gone) == n
    assert all(one.num_left > 0 for one in gone)


def test_a_wall_clock_that_jumps_changes_nothing(faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps a day at every reading. Durations must come from a monotonic clock."""
    true_time, looks = time.time, iter(range(1 << 60))
    queued = faulty.metric("vllm:request_queue_time_seconds_sum")
    spent = faulty.metric("vllm:e2e_request_latency_seconds_sum")
    with faulty.ending(length=3):
        monkeypatch.setattr(time, "time", lambda: true_time() + 86400 * (1 if next(looks) % 2 else -1))
        answers = [(body, faulty.start(body | {"timeout": 30})) for body in NEIGHBOURS]
        for body, answer in answers:
            assert tokens_of(answer.result()) == faulty.plain(body)
            assert 0 <= int(answer.result().headers["openai-processing-ms"]) < 60_000
            assert 0 <= int(answer.result().headers["x-queue-time-ms"]) < 60_000
        assert faulty.http.get("/health").status_code == 200
    assert next(looks) > 0
    assert 0 <= faulty.metric("vllm:request_queue_time_seconds_sum") - queued < 60
    assert 0 < faulty.metric("vllm:e2e_request_latency_seconds_sum") - spent < 180


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_a_full_disk_under_the_log_hurts_nobody(
    faulty: FaultyServer, formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until_up(faulty)
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)  # logging reports its own errors there
        handler = logging.StreamHandler(full)
        handler.setFormatter(formatter)
        logger = logging.getLogger()
        logger.addHandler(handler)
        try:
            with pytest.raises(OSError, match="No space"):
                full.write("a line\n")
            with faulty.ending(length=4, abort=1):
                assert_plain(faulty)
                client = begin(
                    faulty.url, GREEDY | {"prompt": "x", "max_tokens": LONG, "stream": True}, headers=HEADERS
                )
                read_frames(client, 2)
                hang_up(client, politely=False)
                faulty.drafter.plant("raises")  # the engine's thread logs a traceback
                assert_plain(faulty, NEIGHBOURS[:1])
        finally:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):
                full.close()
    wait_until_up(faulty)
