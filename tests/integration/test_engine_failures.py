"""Whatever fails, fails alone, says so, and leaves nothing behind."""

import asyncio
import gc
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.base import Draft, DraftRequest, Pipeline, StepRecord
from service.engine.base import (
    EngineUnavailableError,
    RequestFailedError,
    RequestTimeoutError,
)
from service.engine.embedded import EmbeddedEngine, Progress
from service.engine.scheduler import SchedulerLimits
from service.engine.sequence import Decoding
from tests.checkpoints import VOCABULARY_SIZE, write_checkpoint
from tests.unit.engine.drafters import RuleDrafter, garbage, no_drafts
from tests.unit.engine.driver import Driver
from tests.unit.engine.serving import Gate, collect, request, started, tokens_of, until, verifier
from transformer.model import Transformer
from verifiers.base import Verifier

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


async def test_a_failure_to_load_is_raised_by_start_and_told_by_status() -> None:
    def load(progress: Progress) -> tuple[Verifier, Pipeline]:
        raise FileNotFoundError("models/target is missing")

    engine = EmbeddedEngine(load, SchedulerLimits())
    assert engine.status().phase == "loading"
    with pytest.raises(EngineUnavailableError):
        await collect(engine, request())
    with pytest.raises(FileNotFoundError):
        await engine.start()
    assert engine.status().phase == "dead"
    assert "models/target is missing" in engine.status().detail


async def test_stopping_while_loading_waits_for_the_thread_and_is_no_failure() -> None:
    ended = threading.Event()

    def load(progress: Progress) -> tuple[Verifier, Pipeline]:
        try:
            while True:
                progress("loading", 0.5)
                time.sleep(0.01)
        finally:
            ended.set()

    engine = EmbeddedEngine(load, SchedulerLimits())
    starting = asyncio.create_task(engine.start())
    await until(lambda: engine.status().progress == 0.5)
    await engine.stop(0.0)
    assert ended.is_set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert engine.status().phase == "loading"


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
    assert driver.loop.drafter_up
    for _ in range(20):
        driver.loop.turn()
        now += 1.0
    assert not driver.loop.drafter_up
    assert driver.received["r"].tokens == plain
    assert 3 <= raised <= 5  # after 1, 2, 4, 8 seconds
    assert "no luck" in caplog.text
    reasons = {each.draft.bypass_reason for step in drafter.steps for each in step.outcomes}
    assert reasons == {"prefill", "drafter_failed", "last_token"}
    assert sum(step.num_drafter_failures for step in drafter.steps) == raised
    assert not drafter.remembered


def test_the_drafter_is_up_again_once_it_has_drafted(model: Transformer) -> None:
    now = 0.0
    failures = iter([True, False])

    def rule(_: DraftRequest) -> tuple[int, ...]:
        if next(failures, False):
            raise RuntimeError("once")
        return (1,)

    driver = Driver(verifier(model), RuleDrafter(rule, 4), clock=lambda: now)
    driver.submit(request())
    states = []
    for _ in range(6):
        driver.loop.turn()
        states.append(driver.loop.drafter_up)
        now += 0.6
    assert states == [True, False, False, True, True, True]  # read, failed, paused for a second, drafted


@pytest.mark.parametrize("bad", [[VOCABULARY_SIZE], [-1], [1, 2, 3, 4, 5]], ids=["too high", "negative", "too long"])
def test_drafts_that_break_their_promise_are_not_verified(
    bad: list[int], model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    class Unbounded(RuleDrafter):
        def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
            return [Draft(tuple(bad), "free") for _ in requests]

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
    assert all(step.verify_seconds > 0 for step in seen)


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
