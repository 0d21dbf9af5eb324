"""The life of requests in the embedded engine: joining, leaving, failing, and what is left behind (nothing)."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.base import Draft, DraftRequest, StepRecord
from service.engine.base import (
    EngineUnavailableError,
    GenerationRequest,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
    SpeculationOptions,
    TokenDelta,
)
from service.engine.drafting import Drafting
from service.engine.embedded import EmbeddedEngine, Progress
from service.engine.scheduler import SchedulerLimits
from service.engine.sequence import Decoding
from tests.checkpoints import CONTEXT_LENGTH, VOCABULARY_SIZE, write_checkpoint
from tests.unit.engine.drafters import RuleDrafter, garbage, no_drafts
from tests.unit.engine.driver import Driver
from transformer.model import Transformer
from verifiers.base import SamplingRules, Verifier
from verifiers.torch_lm import TorchVerifier

BROKEN_TOKEN = 7  # of the broken checkpoint: whoever reads it gets logits that are not numbers
OUTSIDE = VOCABULARY_SIZE + 5  # an id that HTTP would refuse: the whole pass fails on it


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Transformer:
    return Transformer.load(tiny_target)


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("broken")
    write_checkpoint(folder, tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN_TOKEN] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Transformer.load(folder)


def verifier(model: Transformer, num_slots: int = 4) -> TorchVerifier:
    return TorchVerifier(model, num_slots=num_slots, context_length=CONTEXT_LENGTH)


def request(name: str = "r", prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 20) -> GenerationRequest:
    return GenerationRequest(name, list(prompt), max_tokens, SamplingRules(seed=0, temperature=0))


def loading(verifier: Verifier, drafter: Drafting) -> Callable[[Progress], tuple[Verifier, Drafting]]:
    def load(progress: Progress) -> tuple[Verifier, Drafting]:
        progress("everything", 0.5)
        return verifier, drafter

    return load


async def started(
    model: Transformer, drafter: Drafting, limits: SchedulerLimits | None = None, hung_after_seconds: float = 60.0
) -> EmbeddedEngine:
    engine = EmbeddedEngine(
        loading(verifier(model), drafter), limits or SchedulerLimits(), hung_after_seconds=hung_after_seconds
    )
    await engine.start()
    return engine


async def collect(engine: EmbeddedEngine, one: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(one)]


def tokens_of(deltas: Sequence[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


class Gate:
    """A rule that drafts nothing and lets no step pass while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open()
        self.shut = self._open.clear

    def open(self) -> None:
        self._open.set()

    def __call__(self, _: DraftRequest) -> tuple[int, ...]:
        assert self._open.wait(20)
        return ()


def slow(_: DraftRequest) -> tuple[int, ...]:
    """Drafts nothing, and takes its time."""
    time.sleep(0.01)
    return ()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (the engine thread has no event for each of these)
            await asyncio.sleep(0.002)


async def test_an_engine_serves_many_at_once_and_gives_each_what_it_would_get_alone(model: Transformer) -> None:
    requests = [request(f"r{i}", range(i, i + 5), 10 + i) for i in range(10)]
    alone = [Driver(verifier(model), no_drafts()).outputs([one])[0] for one in requests]
    drafter = RuleDrafter(garbage(VOCABULARY_SIZE), 4)
    engine = await started(model, drafter)
    try:
        assert engine.status().phase == "ready"
        assert engine.default_draft_tokens == 4
        assert engine.vocabulary_size == VOCABULARY_SIZE
        together = await asyncio.gather(*(collect(engine, one) for one in requests))
    finally:
        await engine.stop(5)
    assert [tokens_of(deltas) for deltas in together] == alone
    assert all(deltas[-1].finish_reason == "length" for deltas in together)
    assert engine.status().phase == "draining"
    with pytest.raises(EngineUnavailableError):
        await collect(engine, requests[0])


async def test_the_drafter_learns_at_start_what_verification_costs(model: Transformer) -> None:
    drafter = RuleDrafter(garbage(VOCABULARY_SIZE), 8)
    engine = await started(model, drafter)
    await engine.stop(1)
    assert {1, 8, 32} <= set(drafter.costs)  # 64 rows would need more slots than there are
    assert all(0 < seconds < 1 for seconds in drafter.costs.values())


async def test_a_failure_to_load_is_raised_by_start_and_told_by_status() -> None:
    def load(progress: Progress) -> tuple[Verifier, Drafting]:
        raise FileNotFoundError("models/target is missing")

    engine = EmbeddedEngine(load, SchedulerLimits())
    assert engine.status().phase == "loading"
    with pytest.raises(EngineUnavailableError):
        await collect(engine, request())
    with pytest.raises(FileNotFoundError):
        await engine.start()
    assert engine.status().phase == "dead"
    assert "models/target is missing" in engine.status().detail


async def test_closing_the_iterator_frees_everything(model: Transformer) -> None:
    drafter = RuleDrafter(garbage(VOCABULARY_SIZE), 4)
    engine = await started(model, drafter)
    try:
        async with aclosing(engine.generate(request(max_tokens=400))) as deltas:
            async for _ in deltas:
                assert engine.status().num_running == 1
                assert engine.status().kv_cache_usage > 0
                break
        await until(lambda: engine.status().num_running == 0)
        assert engine.status().kv_cache_usage == 0
        assert not drafter.remembered
    finally:
        await engine.stop(5)


async def test_cancelling_the_task_frees_everything_even_in_the_queue(model: Transformer) -> None:
    drafter = RuleDrafter(garbage(VOCABULARY_SIZE), 4)
    engine = await started(model, drafter, SchedulerLimits(max_running=1))
    try:
        tasks = [asyncio.create_task(collect(engine, request(f"r{i}", max_tokens=400))) for i in range(3)]
        await until(lambda: (engine.status().num_running, engine.status().num_waiting) == (1, 2))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: engine.status().num_running + engine.status().num_waiting == 0)
        assert not drafter.remembered
        assert len(tokens_of(await collect(engine, request()))) == 20
    finally:
        await engine.stop(5)


async def test_a_full_queue_refuses_at_once_and_recovers(model: Transformer) -> None:
    gate = Gate()
    engine = await started(model, RuleDrafter(gate, 4), SchedulerLimits(max_running=1, max_waiting=2))
    try:
        gate.shut()
        tasks = [asyncio.create_task(collect(engine, request(f"r{i}"))) for i in range(3)]
        await until(lambda: engine.status().num_running + engine.status().num_waiting == 3)
        with pytest.raises(QueueFullError) as refusal:
            await collect(engine, request("one too many"))
        assert 1 <= refusal.value.retry_after_seconds <= 60
        gate.open()
        assert [len(tokens_of(deltas)) for deltas in await asyncio.gather(*tasks)] == [20, 20, 20]
    finally:
        gate.open()
        await engine.stop(5)


async def test_draining_lets_requests_end_and_refuses_new_ones(model: Transformer) -> None:
    gate = Gate()
    engine = await started(model, RuleDrafter(gate, 4), SchedulerLimits(max_running=1))
    gate.shut()
    tasks = [asyncio.create_task(collect(engine, request(f"r{i}"))) for i in range(2)]
    await until(lambda: engine.status().num_running + engine.status().num_waiting == 2)
    stopping = asyncio.create_task(engine.stop(20))
    await until(lambda: engine.status().phase == "draining")
    with pytest.raises(EngineUnavailableError):
        await collect(engine, request("late"))
    gate.open()
    assert [len(tokens_of(deltas)) for deltas in await asyncio.gather(*tasks)] == [20, 20]
    await stopping


async def test_what_does_not_end_in_time_is_aborted(model: Transformer) -> None:
    engine = await started(model, RuleDrafter(slow, 4))
    tasks = [asyncio.create_task(collect(engine, request(f"r{i}", max_tokens=400))) for i in range(6)]  # two must wait
    await until(lambda: engine.status().num_running == 4)
    await engine.stop(0.1)
    for deltas in await asyncio.gather(*tasks):
        assert deltas[-1].finish_reason == "abort"
        assert deltas[-1].stats is not None
    assert engine.status().num_running == engine.status().num_waiting == 0


async def test_a_step_that_takes_too_long_shows_as_hung(model: Transformer) -> None:
    gate = Gate()
    engine = await started(model, RuleDrafter(gate, 4), hung_after_seconds=0.1)
    try:
        gate.shut()
        task = asyncio.create_task(collect(engine, request()))
        await until(lambda: engine.status().phase == "hung")
        with pytest.raises(EngineUnavailableError, match="hung"):
            await collect(engine, request("next"))
        gate.open()
        assert len(tokens_of(await task)) == 20
        assert engine.status().phase == "ready"
    finally:
        gate.open()
        await engine.stop(5)


def test_all_deltas_of_a_step_are_delivered_at_once(model: Transformer) -> None:
    driver = Driver(verifier(model), no_drafts())
    driver.outputs([request(f"r{i}", max_tokens=20) for i in range(4)])
    assert driver.num_deliveries == 20


def test_a_request_runs_out_of_time_running_or_waiting(model: Transformer) -> None:
    now = 0.0
    driver = Driver(verifier(model), no_drafts(), SchedulerLimits(max_running=1), lambda: now)
    driver.submit(replace(request("running", max_tokens=400), timeout_seconds=5))
    driver.submit(replace(request("waiting"), timeout_seconds=3))
    driver.loop.turn()
    driver.loop.turn()
    now = 4.0
    driver.loop.turn()
    assert isinstance(driver.received["waiting"].error, RequestTimeoutError)
    assert driver.received["running"].error is None
    now = 6.0
    driver.loop.turn()
    assert isinstance(driver.received["running"].error, RequestTimeoutError)
    assert len(driver.received["running"].tokens) == 3
    assert driver.loop.num_running == driver.loop.num_waiting == 0


def test_a_draft_may_hold_the_stop_token_in_its_middle(model: Transformer) -> None:
    (plain,) = Driver(verifier(model), no_drafts()).outputs([request()])
    stop = next(token for i, token in enumerate(plain) if i > 2 and token not in plain[:i])
    at = plain.index(stop)
    drafter = RuleDrafter(lambda r: plain[len(r.tokens) - 3 :], 16)
    for include in (False, True):
        driver = Driver(verifier(model), drafter)
        rules = SamplingRules(seed=0, temperature=0, stop_token_ids=(stop,))
        (tokens,) = driver.outputs([replace(request(), rules=rules, include_stop_token=include)])
        assert tokens == plain[: at + include]
        last = driver.received["r"].deltas[-1]
        assert (last.finish_reason, last.stop_token) == ("stop", stop)


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 13])
def test_exactly_max_tokens_whatever_is_accepted(max_tokens: int, model: Transformer) -> None:
    (plain,) = Driver(verifier(model), no_drafts()).outputs([request()])
    drafter = RuleDrafter(lambda r: plain[len(r.tokens) - 3 :], 16)
    driver = Driver(verifier(model), drafter)
    assert driver.outputs([request(max_tokens=max_tokens)]) == [plain[:max_tokens]]
    assert driver.received["r"].finish_reason == "length"
    assert all(each.num_accepted <= max_tokens - 1 for step in drafter.steps for each in step.outcomes)


def test_the_context_can_be_filled_to_its_last_position(model: Transformer) -> None:
    prompt = [i % 250 for i in range(CONTEXT_LENGTH - 30)]
    driver = Driver(verifier(model), RuleDrafter(garbage(VOCABULARY_SIZE), 32))
    (tokens,) = driver.outputs([request(prompt=prompt, max_tokens=30)])
    assert len(tokens) == 30
    with pytest.raises(RequestFailedError, match=str(CONTEXT_LENGTH)):
        driver.submit(request("longer", prompt, 31))


def test_a_drafter_that_raises_costs_drafts_and_nothing_else(
    model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    (plain,) = Driver(verifier(model), no_drafts()).outputs([request()])
    now = 0.0
    raised = 0

    def rule(_: DraftRequest) -> tuple[int, ...]:
        nonlocal raised
        raised += 1
        raise RuntimeError("no luck")

    drafter = RuleDrafter(rule, 4)
    driver = Driver(verifier(model), drafter, clock=lambda: now)
    driver.submit(request())
    for _ in range(20):
        driver.loop.turn()
        now += 1.0
    assert driver.received["r"].tokens == plain
    assert 3 <= raised <= 5  # after 1, 2, 4, 8 seconds
    assert "no luck" in caplog.text
    reasons = {each.draft.bypass_reason for step in drafter.steps for each in step.outcomes}
    assert reasons == {"prefill", "drafter_failed", "last_token"}
    assert not drafter.remembered


@pytest.mark.parametrize("bad", [[VOCABULARY_SIZE], [-1], [1, 2, 3, 4, 5]], ids=["too high", "negative", "too long"])
def test_drafts_that_break_their_promise_are_not_verified(
    bad: list[int], model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    class Unbounded(RuleDrafter):
        def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
            return [Draft(tuple(bad), "copy") for _ in requests]

    (plain,) = Driver(verifier(model), no_drafts()).outputs([request()])
    assert Driver(verifier(model), Unbounded(lambda _: (), 4)).outputs([request()]) == [plain]
    assert "the drafter failed" in caplog.text


def test_an_observer_that_raises_is_let_go_and_the_others_get_every_step(
    model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = RuleDrafter(garbage(VOCABULARY_SIZE), 4)
    seen: list[StepRecord] = []
    calls = 0

    def failing(_: StepRecord) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("disk full")

    driver = Driver(verifier(model), drafter, observers=[failing, seen.append])
    driver.outputs([request()])
    assert calls == 1
    assert seen == drafter.steps  # the very same records
    assert seen[0].num_prefill_rows == seen[0].num_rows == 3
    assert all(step.num_rows == 1 + len(step.outcomes[0].draft.tokens) for step in seen[1:])
    assert all(step.seconds.verify > 0 for step in seen)


def test_a_request_can_go_without_drafts_or_show_them(model: Transformer) -> None:
    drafter = RuleDrafter(garbage(VOCABULARY_SIZE), 4)
    driver = Driver(verifier(model), drafter)
    driver.submit(replace(request("plain"), speculation=SpeculationOptions(enabled=False)))
    driver.submit(replace(request("traced"), speculation=SpeculationOptions(trace=True)))
    driver.finish()
    plain, traced = driver.received["plain"], driver.received["traced"]
    assert plain.tokens == traced.tokens
    assert all(delta.trace is None for delta in plain.deltas)
    last = plain.deltas[-1].stats
    assert last is not None
    assert last.num_draft_tokens == 0
    assert {
        each.draft.bypass_reason for step in drafter.steps for each in step.outcomes if each.request_id == "plain"
    } == {"prefill", "disabled"}
    traces = [delta.trace for delta in traced.deltas[1:-1] if delta.trace is not None]
    assert all(len(trace.drafted) <= 4 and trace.source == "copy" for trace in traces)
    assert any(trace.drafted for trace in traces)


def test_logits_that_are_not_numbers_fail_one_request_and_spoil_no_slot(broken_model: Transformer) -> None:
    good = [request(f"good{i}", range(20, 30 + i)) for i in range(3)]
    alone = [Driver(verifier(broken_model), no_drafts()).outputs([one])[0] for one in good]
    assert all(BROKEN_TOKEN not in tokens for tokens in alone)
    driver = Driver(verifier(broken_model), no_drafts(), SchedulerLimits(max_running=2))
    for i, one in enumerate(good):  # good and bad ones share the two slots, one after the other
        driver.submit(request(f"bad{i}", [5, BROKEN_TOKEN, *range(40)]))
        driver.submit(one)
    driver.finish()
    assert [driver.received[one.request_id].tokens for one in good] == alone
    for i in range(3):
        assert isinstance(driver.received[f"bad{i}"].error, RequestFailedError)


def test_a_pass_that_fails_takes_its_batch_along_and_the_engine_goes_on(
    model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(verifier(model), no_drafts())
    driver.submit(request("bystander"))
    driver.loop.turn()
    driver.submit(request("outside", [OUTSIDE]))
    driver.finish()
    assert isinstance(driver.received["bystander"].error, RequestFailedError)
    assert isinstance(driver.received["outside"].error, RequestFailedError)
    assert driver.outputs([request("next")]) == Driver(verifier(model), no_drafts()).outputs([request()])
    assert "a step over 2 requests failed" in caplog.text


async def test_an_engine_that_fails_three_times_in_a_row_is_dead(
    model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await started(model, no_drafts())
    for i in range(3):
        with pytest.raises(RequestFailedError):
            await collect(engine, request(f"r{i}", [OUTSIDE]))
    await until(lambda: engine.status().phase == "dead")
    assert "3 times in a row" in engine.status().detail
    with pytest.raises(EngineUnavailableError, match="dead"):
        await collect(engine, request())
    await engine.stop(1)
    assert "the engine has died" in caplog.text


def test_nothing_is_left_of_a_thousand_cancelled_requests(model: Transformer) -> None:
    drafter = RuleDrafter(garbage(VOCABULARY_SIZE), 2)
    driver = Driver(verifier(model), drafter, SchedulerLimits(max_running=4, max_waiting=1000))
    for i in range(1000):
        driver.submit(request(f"r{i}", [i % 250, 1, 2, 3], 100))
        if i % 4 == 3:  # some in the queue, some while reading, some while decoding
            for _ in range(i % 3):
                driver.loop.turn()
            for j in range(i - 3, i + 1):
                driver.loop.cancel(f"r{j}")
    driver.loop.turn()
    assert driver.loop.num_running == driver.loop.num_waiting == 0
    assert driver.loop.cache_usage == 0
    assert not drafter.remembered
    gc.collect()
    assert not any(type(one) is Decoding for one in gc.get_objects())
    assert all(not received.is_finished for received in driver.received.values())


def test_a_used_id_is_refused_while_it_runs(model: Transformer) -> None:
    driver = Driver(verifier(model), no_drafts())
    driver.submit(request())
    with pytest.raises(RequestFailedError, match="running already"):
        driver.loop.submit(request())
    driver.finish()
    driver.submit(request())
