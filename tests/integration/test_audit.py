"""The audit catches wrong tokens in live requests, stays out of their way, and reports nothing else."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.engine.audit import Audit, AuditedEngine, AuditOptions
from service.engine.base import GenerationRequest, SpeculationOptions, TokenDelta
from service.engine.embedded import EmbeddedEngine
from service.engine.scheduler import SchedulerLimits
from service.metrics import ServiceMetrics
from tests.checkpoints import CONTEXT_LENGTH, VOCABULARY_SIZE
from tests.unit.engine.drafters import RuleDrafter, garbage
from tests.unit.engine.serving import collect, loading, tokens_of, until
from transformer.model import Transformer
from verifiers.base import SamplingRules, Verifier, VerifyRequest, VerifyResult
from verifiers.torch_lm import TorchVerifier

NUM_REQUESTS = 200


class Lenient(TorchVerifier):
    """A planted defect: now and then, accept a draft token that the target did not draw."""

    num_wrong = 0
    _num_rejections = 0

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult]:
        return [self._bend(*work) for work in zip(requests, super().verify(requests), strict=True)]

    def _bend(self, request: VerifyRequest, result: VerifyResult) -> VerifyResult:
        verification = result.verification
        if verification is None or verification.num_accepted == len(request.draft) or request.rules.logprobs:
            return result
        self._num_rejections += 1
        if self._num_rejections % 97:
            return result
        self.num_wrong += 1
        wrong = request.draft[verification.num_accepted]
        return replace(result, verification=replace(verification, next_token=wrong))


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Transformer:
    return Transformer.load(tiny_target)


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"r{i}",
            [i % 250, 1, 2, i % 7],
            16,
            SamplingRules(seed=i, temperature=0.0 if i % 2 else 1.0, repetition_penalty=1.1),
        )
        for i in range(NUM_REQUESTS)
    ]


@asynccontextmanager
async def audited(
    verifier: Verifier, options: AuditOptions, audits: list[Audit]
) -> AsyncIterator[tuple[AuditedEngine, EmbeddedEngine]]:
    inner = EmbeddedEngine(loading(verifier, RuleDrafter(garbage(VOCABULARY_SIZE), 4)), SchedulerLimits(max_running=8))
    numbers = iter(range(10**9))
    engine = AuditedEngine(inner, options, audits.append, lambda: next(numbers) % 10 / 10, poll_seconds=0.002)
    await engine.start()
    try:
        yield engine, inner
    finally:
        await engine.stop(5)


async def serve_all(engine: AuditedEngine) -> None:
    await asyncio.gather(*(collect(engine, one) for one in requests()))  # type: ignore[arg-type]


async def test_a_planted_defect_in_acceptance_is_caught_within_200_requests(
    model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    audits: list[Audit] = []
    verifier = Lenient(model, 8, CONTEXT_LENGTH)
    async with audited(verifier, AuditOptions(0.2, idle_seconds=0.0), audits) as (engine, _):
        await serve_all(engine)
        await until(lambda: len(audits) == NUM_REQUESTS // 5)
    assert 0 < verifier.num_wrong < NUM_REQUESTS // 4  # rare, and caught all the same
    failed = [audit for audit in audits if audit.is_failed]
    assert 0 < len(failed) <= verifier.num_wrong
    for audit in failed:
        assert f"audit of request {audit.request_id}: output token {audit.differs_at}" in caplog.text
        assert f"margin {audit.margin_nats:.2e}" in caplog.text


async def test_right_outputs_pass(model: Transformer, caplog: pytest.LogCaptureFixture) -> None:
    audits: list[Audit] = []
    with caplog.at_level(logging.WARNING):
        async with audited(TorchVerifier(model, 8, CONTEXT_LENGTH), AuditOptions(0.2, 0.0), audits) as (engine, _):
            await serve_all(engine)
            await until(lambda: len(audits) == NUM_REQUESTS // 5)
    assert all(audit.differs_at is None and audit.num_tokens == 16 for audit in audits)
    assert not caplog.records


async def test_live_requests_go_first_and_the_audit_comes_later(model: Transformer) -> None:
    audits: list[Audit] = []
    verifier = TorchVerifier(model, 8, CONTEXT_LENGTH)
    async with audited(verifier, AuditOptions(1.0, idle_seconds=0.0), audits) as (engine, inner):
        long = GenerationRequest("long", [1, 2, 3], 400, SamplingRules(seed=0, temperature=0))
        assert len(tokens_of(await collect(engine, long))) == 400  # type: ignore[arg-type]
        await until(lambda: inner.status().num_running == 1)  # the audit has begun
        off = replace(long, request_id="live", max_tokens=60, speculation=SpeculationOptions(False))
        await collect(engine, off)  # type: ignore[arg-type]
        assert not audits
        await until(lambda: len(audits) == 1)
        assert engine.num_begun >= 2  # it gave way, and began again
    assert audits[0] == Audit("long", 400, None)


async def test_a_request_that_its_client_cut_off_is_audited_as_far_as_it_went(model: Transformer) -> None:
    audits: list[Audit] = []
    async with audited(TorchVerifier(model, 8, CONTEXT_LENGTH), AuditOptions(1.0, 0.0), audits) as (engine, _):
        one = GenerationRequest("cut", [1, 2, 3], 400, SamplingRules(seed=0, temperature=0))
        deltas = engine._listen(one)
        heard = len((await anext(deltas)).tokens) + len((await anext(deltas)).tokens)
        await deltas.aclose()
        await until(lambda: len(audits) == 1)
    assert audits == [Audit("cut", heard, None)]


async def test_only_greedy_requests_where_draws_have_no_key(model: Transformer) -> None:
    audits: list[Audit] = []
    options = AuditOptions(1.0, 0.0, greedy_only=True)
    async with audited(TorchVerifier(model, 8, CONTEXT_LENGTH), options, audits) as (engine, _):
        for one in requests()[:4]:
            await collect(engine, one)  # type: ignore[arg-type]
        await until(lambda: len(audits) == 2)
        assert engine.num_pending == 0
    assert {audit.request_id for audit in audits} == {"r1", "r3"}


async def test_those_that_wait_are_bounded(model: Transformer) -> None:
    audits: list[Audit] = []
    options = AuditOptions(1.0, idle_seconds=60.0, max_pending=3)
    async with audited(TorchVerifier(model, 8, CONTEXT_LENGTH), options, audits) as (engine, _):
        for one in requests()[:5]:
            await collect(engine, one)  # type: ignore[arg-type]
        assert engine.num_pending == 3
    assert not audits


class Faulty(EmbeddedEngine):
    """A planted defect: the first audit raises what no engine promises to raise."""

    is_broken = False

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        if self.is_broken and request.request_id == "audit-1":
            raise ZeroDivisionError("planted")
        return super().generate(request)


def count(metrics: ServiceMetrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"diffuspec_{name}_total", {"model_name": "tiny"})


@pytest.mark.parametrize("breaks", ["engine", "report"])
async def test_audits_go_on_after_an_error_that_is_logged_and_counted(
    model: Transformer, breaks: str, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = ServiceMetrics(CollectorRegistry(), "tiny")
    reports = iter([breaks == "report"])

    def report(audit: Audit) -> None:
        if next(reports, False):
            raise ZeroDivisionError("planted")
        metrics.observe_audit(audit.is_failed)

    drafting = RuleDrafter(garbage(VOCABULARY_SIZE), 4)
    inner = Faulty(loading(TorchVerifier(model, 8, CONTEXT_LENGTH), drafting), SchedulerLimits())
    inner.is_broken = breaks == "engine"
    options = AuditOptions(1.0, idle_seconds=0.0)
    engine = AuditedEngine(inner, options, report, lambda: 0.0, 0.002, metrics.observe_audit_error)
    await engine.start()
    try:
        for one in requests()[:3]:
            await collect(engine, one)  # type: ignore[arg-type]
        await until(lambda: count(metrics, "audits_run") == 2)
        assert engine.num_pending == 0
    finally:
        await engine.stop(5)
    assert count(metrics, "audit_errors") == 1
    assert count(metrics, "audits_failed") == 0
    assert "the audit of request r0 was given up" in caplog.text
    assert "planted" in caplog.text


def test_audits_are_counted() -> None:
    metrics = ServiceMetrics(CollectorRegistry(), "tiny")
    metrics.observe_audit(is_failed=False)
    metrics.observe_audit(is_failed=True)
    assert [count(metrics, "audits_run"), count(metrics, "audits_failed")] == [2, 1]
