"""A drafter may do anything: the engine lives, and the text is that of plain decoding."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.vllm import pipelines
from tests.vllm.conftest import InProcess
from tests.vllm.test_greedy import drafted, params


@pytest.fixture(scope="module")
def expected(plain: InProcess, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    return [run.tokens for run in plain.run(prompts[:4], params(60))]


@pytest.mark.parametrize(
    "error", [ValueError("step 37"), MemoryError(), RuntimeError("out of memory"), RecursionError()]
)
def test_a_drafter_that_raises_at_step_37_costs_drafts_alone(
    speculative: InProcess, prompts: list[list[int]], expected: list[tuple[int, ...]], error: Exception
) -> None:
    speculative.use(pipelines.raising(37, error))
    runs = speculative.run(prompts[:4], params(60))
    assert [run.tokens for run in runs] == expected
    assert speculative.guard.num_failures == 1
    assert type(error).__name__ in speculative.guard.last_failure
    assert not speculative.guard.is_up
    speculative.guard.backoff.succeed()  # ends the pause
    again = speculative.run(prompts[:4], params(60))
    assert [run.tokens for run in again] == expected
    assert drafted(again)[0] > 0


def test_a_drafter_that_sleeps_is_left_out_afterwards(
    speculative: InProcess, prompts: list[list[int]], expected: list[tuple[int, ...]]
) -> None:
    speculative.use(pipelines.sleeping(at_step=5, seconds=5.0))
    runs = speculative.run(prompts[:4], params(60))
    assert [run.tokens for run in runs] == expected
    assert "drafting took" in speculative.guard.last_failure
    assert speculative.guard.num_failures >= 1


@pytest.mark.parametrize("kind", pipelines.NONSENSE)
def test_nonsense_never_reaches_vllm(
    speculative: InProcess, prompts: list[list[int]], expected: list[tuple[int, ...]], kind: str
) -> None:
    speculative.use(pipelines.nonsense(kind))
    runs = speculative.run(prompts[:4], params(60))
    assert [run.tokens for run in runs] == expected
    is_usable = kind in ("too long", "numpy")  # cut, or read as the ids they are
    assert (speculative.guard.num_failures == 0) == is_usable


def test_a_request_at_the_contexts_end_does_not_take_drafts_from_others(
    speculative: InProcess, plain: InProcess, prompts: list[list[int]]
) -> None:
    """vLLM itself stops drafting for the whole batch then, and verifies zeros instead."""
    context = speculative.llm.llm_engine.model_config.max_model_len
    long = (prompts[0] * (context // len(prompts[0]) + 1))[: context - 24]
    speculative.use(pipelines.garbage(speculative.vocabulary_size))
    speculative.proposer.take_records()
    wanted = [params(24), params(24)]
    runs = speculative.run([long, prompts[1]], wanted)
    assert [run.tokens for run in runs] == [run.tokens for run in plain.run([long, prompts[1]], wanted)]
    assert len(long) + len(runs[0].tokens) == context
    assert speculative.guard.num_failures == 0
    records = speculative.proposer.take_records()
    rows = [outcome.draft.tokens for record in records for outcome in record.outcomes]
    assert any(rows)
    assert all(set(tokens) != {0} for tokens in rows if len(tokens) > 1)


async def test_a_shutdown_that_takes_its_time_is_no_death(tiny_folders: tuple[Path, Path]) -> None:
    """The server ends with status 1 when its engine dies, and 0 after a signal."""
    from service.engine.vllm.engine import VllmEngine
    from tests.vllm.conftest import settings_for

    class Closing:
        errored = False

        def shutdown(self) -> None:
            time.sleep(0.3)

    target, drafter = tiny_folders
    engine = VllmEngine(settings_for(**{"model.target": str(target), "model.drafter": str(drafter)}), ())
    engine._llm, engine._is_ready = Closing(), True
    assert engine.status().phase == "ready"
    stopping = asyncio.create_task(engine.stop(0))
    phases = set()
    while not stopping.done():
        await asyncio.sleep(0.01)
        phases.add(engine.status().phase)
    assert phases == {"draining"}


def test_what_does_not_fit_is_refused_with_the_three_numbers(tiny_folders: tuple[Path, Path]) -> None:
    from service.engine.vllm.config import MemoryBudgetError, TargetFacts, budget
    from tests.vllm.conftest import settings_for

    target, drafter = tiny_folders
    settings = settings_for(**{"model.target": str(target), "model.drafter": str(drafter)})
    facts = TargetFacts.from_folder(target, "float32")
    plan = budget(settings, facts, (1 << 30, 1 << 30))
    assert plan.target + plan.drafter + plan.kv_cache + plan.activations <= 0.9 * (1 << 30)
    assert 0 < plan.utilization < 0.9
    with pytest.raises(
        MemoryBudgetError, match=r"the target needs .* GiB, the KV cache at least .* the drafter .* GiB"
    ):
        budget(settings, facts, (1 << 20, 1 << 20))
