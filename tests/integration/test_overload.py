"""Ten times more requests than can be served, arriving at a fixed rate. Time is counted in steps."""

from collections import deque
from pathlib import Path

import pytest

from service.engine.base import GenerationRequest, QueueFullError, RequestTimeoutError
from service.engine.scheduler import SchedulerLimits
from tests.checkpoints import CONTEXT_LENGTH
from tests.unit.engine.drafters import no_drafts
from tests.unit.engine.driver import Driver
from transformer.model import Transformer
from verifiers.base import SamplingRules
from verifiers.torch_lm import TorchVerifier

MAX_RUNNING, TOKENS, STEPS = 8, 10, 300
CAPACITY = MAX_RUNNING / TOKENS  # requests per step


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Transformer:
    return Transformer.load(tiny_target)


class OpenLoop:
    """Sends requests at a rate and records what becomes of them. A step takes one second."""

    def __init__(self, model: Transformer, max_waiting: int, timeout_seconds: float | None = None) -> None:
        self.now = 0.0
        limits = SchedulerLimits(MAX_RUNNING, max_waiting=max_waiting)
        verifier = TorchVerifier(model, MAX_RUNNING, CONTEXT_LENGTH)
        self.driver = Driver(verifier, no_drafts(), limits, lambda: self.now)
        self.began: dict[str, float] = {}
        self.latencies: list[float] = []
        self.refusals: list[tuple[float, float]] = []  # time and Retry-After
        self.max_live = 0
        self._timeout_seconds = timeout_seconds
        self._num_sent = 0

    def send(self, name: str, tenant: str = "") -> None:
        self._num_sent += 1
        request = GenerationRequest(
            name,
            [1, len(name), 3],
            TOKENS - 4 + self._num_sent % 9,  # varied, so that they don't all end at the same step
            SamplingRules(seed=0, temperature=0),
            timeout_seconds=self._timeout_seconds,
            tenant=tenant,
        )
        try:
            self.driver.submit(request)
            self.began[name] = self.now
        except QueueFullError as error:
            self.refusals.append((self.now, error.retry_after_seconds))

    def step(self) -> None:
        self.driver.loop.turn()
        self.now += 1.0
        for name in [name for name in self.began if self.driver.received[name].is_finished]:
            self.latencies.append(self.now - self.began.pop(name))
        self.max_live = max(self.max_live, self.driver.loop.num_running + self.driver.loop.num_waiting)

    def run(self, rate: float) -> None:
        """Send at `rate` for a while, then let all accepted requests end."""
        due = 0.0
        for step in range(STEPS):
            due += rate
            while due >= 1:
                due -= 1
                self.send(f"r{step}-{due:.3f}")
            self.step()
        for _ in range(STEPS):
            if not self.began:
                break
            self.step()
        assert not self.began  # nobody waits forever

    def latency(self, share: float) -> float:
        return sorted(self.latencies)[int(share * (len(self.latencies) - 1))]


def test_accepted_requests_keep_their_latency_and_the_others_are_told(model: Transformer) -> None:
    """The queue holds a quarter of a batch. A longer one means longer latencies, which is the operator's choice."""
    at_capacity, overloaded = (OpenLoop(model, max_waiting=MAX_RUNNING // 4) for _ in range(2))
    at_capacity.run(CAPACITY)
    overloaded.run(10 * CAPACITY)
    assert len(at_capacity.latencies) > 0.8 * CAPACITY * STEPS
    assert len(overloaded.latencies) >= 0.95 * len(at_capacity.latencies)  # throughput does not fall
    assert len(overloaded.refusals) > 8 * CAPACITY * STEPS
    for share in (0.5, 0.95):
        assert overloaded.latency(share) <= 1.5 * at_capacity.latency(share)
    assert overloaded.max_live <= MAX_RUNNING + MAX_RUNNING // 4
    assert overloaded.driver.loop.cache_usage == 0


def test_retry_after_is_when_the_queue_will_have_drained(model: Transformer) -> None:
    load = OpenLoop(model, max_waiting=24)
    load.run(10 * CAPACITY)
    expected = 24 / CAPACITY  # seconds until all waiting requests are admitted
    later = [seconds for when, seconds in load.refusals if when > 100 and when < STEPS]
    assert all(expected / 1.5 <= seconds <= expected * 1.5 for seconds in later)


def test_a_deadline_ends_waiting(model: Transformer) -> None:
    load = OpenLoop(model, max_waiting=200, timeout_seconds=25.0)
    load.run(5 * CAPACITY)
    assert max(load.latencies) <= 26
    errors = [received.error for received in load.driver.received.values() if received.error is not None]
    assert errors
    assert all(isinstance(error, RequestTimeoutError) for error in errors)


def test_a_key_that_floods_does_not_starve_another(model: Transformer) -> None:
    load = OpenLoop(model, max_waiting=16)
    quiet: deque[str] = deque()
    for step in range(100):
        for i in range(8):
            load.send(f"flood{step}-{i}", "flood")
        if step % 10 == 5:
            quiet.append(f"quiet{step}")
            load.send(quiet[-1], "quiet")
        load.step()
    finished = [name for name in quiet if load.driver.received.get(name) and load.driver.received[name].is_finished]
    assert len(finished) >= len(quiet) - 3
    waits = [load.driver.received[name].deltas[0].queue_seconds for name in finished]
    assert max(waits) <= 2 * TOKENS
