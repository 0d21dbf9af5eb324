"""The load test measures what it claims, and its mix draws the right workloads."""

import json
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.deploy.scripts import load

streaming, workloads = load("loadtest/streaming"), load("loadtest/workloads")


class Answer:
    """A response whose pieces come at given times, on a clock of its own."""

    def __init__(self, pieces: Iterable[tuple[float, str]], status_code: int = 200, text: str = "") -> None:
        self.pieces, self.status_code, self.text = list(pieces), status_code, text
        self.now = 0.0
        self.is_closed = False

    def clock(self) -> float:
        return self.now

    def iter_content(self, chunk_size: int | None = None) -> Iterator[bytes]:
        for moment, piece in self.pieces:
            self.now = moment
            yield piece.encode()

    def close(self) -> None:
        self.is_closed = True


def chunk(num_tokens: int) -> str:
    return f"data: {json.dumps({'choices': [{'token_ids': [7] * num_tokens}]})}\n\n"


def read(answer: Answer, stop_after_tokens: int | None = None) -> Any:
    try:
        return streaming.read_stream(answer, 0.0, answer.clock, stop_after_tokens)
    finally:
        assert answer.is_closed


def test_tokens_of_one_chunk_share_the_wait_for_it() -> None:
    timing = read(
        Answer([(0.5, chunk(1)), (0.6, chunk(0)), (0.9, chunk(4)), (1.0, chunk(1)), (1.1, "data: [DONE]\n\n")])
    )
    assert timing.first_token == 0.5
    assert timing.between_tokens == pytest.approx([0.1, 0.1])  # the chunk without tokens does not count
    assert (timing.total, timing.num_tokens) == (1.1, 6)


def test_a_cancelled_request_ends_when_its_user_walks_away() -> None:
    timing = read(Answer([(0.5, chunk(1)), (0.7, chunk(3)), (9.0, chunk(90))]), stop_after_tokens=3)
    assert (timing.total, timing.num_tokens) == (0.7, 4)


def test_refusals_and_broken_streams_are_failures() -> None:
    body = json.dumps({"error": {"code": "queue_full", "type": "rate_limit_error"}})
    with pytest.raises(streaming.RefusedError, match="429: queue_full"):
        read(Answer([], 429, body))
    with pytest.raises(streaming.RefusedError, match="502: not an OpenAI error"):
        read(Answer([], 502, "<html>"))
    with pytest.raises(streaming.RefusedError, match="in the stream: not_ready"):
        read(Answer([(0.1, chunk(1)), (0.2, 'data: {"error": {"code": "not_ready"}}\n\n')]))
    with pytest.raises(streaming.CutShortError):
        read(Answer([(0.1, chunk(1))]))


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))), st.data())
def test_events_do_not_depend_on_how_the_bytes_are_cut(texts: list[str], data: st.DataObject) -> None:
    stream = "".join(f": a comment\ndata: x{text}y\n\n" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert list(streaming.events(pieces)) == [f"x{text}y" for text in texts]


def test_a_seed_draws_the_same_requests_and_all_workloads_come_as_often_as_they_should() -> None:
    mix = workloads.Mix()
    draws = [[mix.draw(random, "m") for _ in range(2000)] for random in (Random(7), Random(7))]
    assert draws[0] == draws[1]
    counts = {
        name: sum(request.workload == name for request in draws[0]) for name in ("completion", "chat", "cancelled")
    }
    assert counts["completion"] == pytest.approx(800, abs=100)
    assert counts["chat"] == pytest.approx(400, abs=100)
    assert counts["cancelled"] == pytest.approx(200, abs=80)
    assert all((request.stop_after_tokens is not None) == (request.workload == "cancelled") for request in draws[0])
    long_prompts = [request.body["prompt"] for request in draws[0] if request.workload == "long"]
    assert len(set(long_prompts)) == len(long_prompts)


def test_a_mix_can_be_chosen() -> None:
    mix = workloads.Mix.parse("chat=1,long=3", 10)
    assert (mix.chat, mix.long, mix.completion, mix.max_tokens) == (1, 3, 0, 10)
    assert workloads.Mix.parse("", 10) == workloads.Mix(max_tokens=10)
    with pytest.raises(ValueError, match="unknown workload 'chats'"):
        workloads.Mix.parse("chats=1", 10)
