"""Live requests: who waits, what is full, when to come back, and when vLLM hangs."""

import asyncio

import pytest

from service.engine.vllm.requests import LiveRequests


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_only_live_requests_can_hang() -> None:
    clock = Clock()
    live = LiveRequests(clock)
    clock.now += 50
    assert live.seconds_without_progress == 0.0
    with live.hold("a", 1):
        assert live.seconds_without_progress == 0.0  # it has only just come
        clock.now += 3
        assert live.seconds_without_progress == 3.0
        with live.hold("b", 1):
            assert live.seconds_without_progress == 3.0  # a second one is no progress of the first
        live.note_progress()
        assert live.seconds_without_progress == 0.0
        clock.now += 3
    assert live.seconds_without_progress == 0.0


async def test_those_who_came_last_wait() -> None:
    live = LiveRequests(Clock())
    with live.hold("a", 1), live.hold("b", 2), live.hold("c", 4), live.hold("d", 8):
        assert live.waiting_tokens(2) == [4, 8]
        assert live.waiting_tokens(4) == []
    assert live.waiting_tokens(0) == []


async def test_a_refusal_says_what_is_full() -> None:
    live = LiveRequests(Clock())
    assert live.what_is_full(1, 0, None) == ""
    with live.hold("a", 10):
        assert live.what_is_full(1, 0, None) == "1 requests are running already, and none may wait"
        assert live.what_is_full(1, 1, 1) == ""  # whoever runs does not wait
        with live.hold("b", 20):
            assert live.what_is_full(1, 1, None) == "1 requests are waiting already"
            assert live.what_is_full(1, 2, 20) == "requests of 20 tokens are waiting already"
            assert live.what_is_full(1, 2, 21) == ""


async def test_places_become_free_at_the_rate_at_which_requests_ended() -> None:
    clock = Clock()
    live = LiveRequests(clock)
    assert live.retry_after(5) == 1.0
    with live.hold("long", 1):
        for number in range(100):
            clock.now += 4.0 if number < 50 else 0.5  # what was long ago is forgotten
            with live.hold(str(number), 1):
                pass
        assert live.retry_after(8) == pytest.approx(8 * 0.5, rel=0.05)
        clock.now += 64
        assert live.retry_after(8) > 15  # nothing has ended for a while
        clock.now += 1e6
        assert live.retry_after(8) == 60.0


async def test_a_quiet_hour_says_nothing_about_the_rate() -> None:
    clock = Clock()
    live = LiveRequests(clock)
    for _ in range(2):
        with live.hold("long", 1):
            for number in range(40):
                clock.now += 0.5
                with live.hold(str(number), 1):
                    pass
            assert live.retry_after(8) == pytest.approx(8 * 0.5, rel=0.05)
        clock.now += 3600
        with live.hold("first", 1):
            assert live.retry_after(8) == 1.0


async def test_waiting_ends_with_the_last_request_even_if_it_failed() -> None:
    live = LiveRequests(Clock())
    assert await live.wait_idle(0.0)

    async def fail() -> None:
        with live.hold("a", 1):
            await asyncio.sleep(0.01)
            raise ValueError

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    assert list(live) == ["a"]
    assert "a" in live
    assert not await live.wait_idle(0.0)
    assert await live.wait_idle(10.0)
    assert isinstance(task.exception(), ValueError)
