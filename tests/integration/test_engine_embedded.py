"""The life of requests in the embedded engine: joining, leaving, and what they are given."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from service.engine.base import (
    EngineUnavailableError,
    QueueFullError,
    RequestFailedError,
    SpeculationOptions,
)
from service.engine.scheduler import SchedulerLimits
from tests.checkpoints import CONTEXT_LENGTH, VOCABULARY_SIZE
from tests.unit.engine.drafters import RuleDrafter, garbage, no_drafts
from tests.unit.engine.driver import Driver
from tests.unit.engine.serving import Gate, collect, request, slow, started, tokens_of, until, verifier
from transformer.model import Transformer
from verifiers.base import SamplingRules


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Transformer:
    return Transformer.load(tiny_target)


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


def test_all_deltas_of_a_step_are_delivered_at_once(model: Transformer) -> None:
    driver = Driver(verifier(model), no_drafts())
    driver.outputs([request(f"r{i}", max_tokens=20) for i in range(4)])
    assert driver.num_deliveries == 20


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
    assert all(len(trace.drafted) <= 4 and trace.source == "free" for trace in traces)
    assert any(trace.drafted for trace in traces)
