import time
from pathlib import Path

import pytest

from service.bench.cells import CELLS, UnknownCellError, choose_cells
from service.bench.embedded import EmbeddedContestant
from service.bench.interleave import Task, measure, rotated
from service.bench.prompts import Prompt, batches
from service.bench.records import Workload, WorkloadRecord
from service.bench.summary import summarize
from service.bench.transformers_generate import TransformersContestant
from tests.unit.bench.conftest import SLOTS, Start

TOKENS = 24


async def _measure(
    contestants: list[EmbeddedContestant], workload: Workload, prompts: list[Prompt], deadline: float = float("inf")
) -> WorkloadRecord:
    grouped = batches(prompts, workload.concurrency)
    task = Task(workload, grouped * 2, grouped[:1])
    return await measure(contestants, task, 7, deadline, time.perf_counter, lambda text: None)


async def test_every_cell_says_what_plain_decoding_says(start: Start, prompts: list[Prompt]) -> None:
    async with start(*(cell.name for cell in CELLS)) as contestants:
        greedy, sampled = [
            await _measure(contestants, Workload(SLOTS, temperature, TOKENS), prompts) for temperature in (0.0, 0.8)
        ]
    for record in (greedy, sampled):
        assert record.mismatches == ()
        assert record.num_pairs == record.num_pairs_planned == 2
        summaries = {summary.contestant: summary for summary in summarize(record)}
        assert list(summaries) == [cell.name for cell in CELLS]
        assert {summary.num_tokens for summary in summaries.values()} == {2 * SLOTS * TOKENS}
        assert summaries["plain"].acceptance.length == 1.0
        assert summaries["plain"].draft_lengths == (2 * SLOTS * (TOKENS - 1),)
        assert summaries["prompt-lookup"].sources["free"] > 0
        assert summaries["cps-fixed"].sources["diffusion"] > 0.8
        assert len(summaries["argmax-paper"].draft_lengths) > 17  # the service's own longest draft is 16
    assert greedy.passes[0].generations != sampled.passes[0].generations


async def test_steps_account_for_every_token(start: Start, prompts: list[Prompt]) -> None:
    async with start("prompt-lookup", "cps-fixed") as contestants:
        record = await _measure(contestants, Workload(1, 0.0, TOKENS), prompts)
    for entry in record.passes:
        for generation in entry.generations:
            assert sum(step.num_accepted + 1 for step in generation.steps) == TOKENS - 1
            assert list(generation.delta_seconds) == sorted(generation.delta_seconds)
        assert entry.phases is not None
        assert entry.phases.total == pytest.approx(entry.seconds)
        assert entry.phases.prompt > 0
        assert 0 < entry.decode_seconds < entry.seconds


async def test_another_text_is_found_out(start: Start, prompts: list[Prompt], other_target: Path) -> None:
    async with start() as [reference], start("prompt-lookup", target=other_target) as [_, other]:
        record = await _measure([reference, other], Workload(1, 0.0, TOKENS), prompts)
    assert record.reference == "plain"
    assert record.free == ("prompt-lookup",)
    assert len(record.mismatches) == record.num_pairs == 6
    for mismatch in record.mismatches:
        assert mismatch.contestant == "prompt-lookup"
        assert mismatch.margin is None or mismatch.margin > 0
        assert not mismatch.is_near_tie
    assert any(mismatch.margin for mismatch in record.mismatches)


async def test_only_close_tokens_are_excused(start: Start, prompts: list[Prompt], other_target: Path) -> None:
    async with start() as [reference], start("prompt-lookup", target=other_target) as [_, other]:
        workload = Workload(1, 0.0, TOKENS)
        strict = await _measure([reference, other], workload, prompts)
        margins = sorted(entry.margin for entry in strict.mismatches if entry.margin is not None)
        other.tolerated_margin = (margins[0] + margins[-1]) / 2
        lenient = await _measure([reference, other], workload, prompts)
    assert {entry.is_near_tie for entry in lenient.mismatches} == {True, False}
    for entry in lenient.mismatches:
        assert entry.is_near_tie == (entry.margin is not None and entry.margin <= other.tolerated_margin)


async def test_transformers_says_the_same_and_leaves_sampling_out(
    start: Start, prompts: list[Prompt], tiny_target: Path
) -> None:
    import torch

    yardstick = TransformersContestant(tiny_target, torch.float32, "cpu")
    async with start() as [plain]:
        greedy = await measure(
            [plain, yardstick],
            Task(Workload(SLOTS, 0.0, TOKENS), batches(prompts, SLOTS), []),
            0, float("inf"), time.perf_counter, lambda text: None,
        )  # fmt: skip
    assert greedy.mismatches == ()
    assert {entry.contestant for entry in greedy.passes} == {"plain", "transformers"}
    assert all(0 < entry.decode_seconds < entry.seconds for entry in greedy.passes)
    assert not yardstick.takes(Workload(1, 0.5, TOKENS))


async def test_time_up_ends_after_a_whole_pair(start: Start, prompts: list[Prompt]) -> None:
    async with start("prompt-lookup") as contestants:
        record = await _measure(contestants, Workload(1, 0.0, 4), prompts, deadline=time.perf_counter())
    assert record.num_pairs == 1
    assert record.num_pairs_planned == 6
    assert [entry.contestant for entry in record.passes] == ["plain", "prompt-lookup"]


async def test_everyone_is_first_in_turn(start: Start) -> None:
    async with start("prompt-lookup", "free") as contestants:
        orders = [[contestant.name for contestant in rotated(contestants, pair)] for pair in range(4)]
    assert [order[0] for order in orders] == ["plain", "prompt-lookup", "free", "plain"]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_plain_is_always_among_the_cells() -> None:
    assert [cell.name for cell in choose_cells(["free", "plain", "free"], False, True)] == ["plain", "free"]
    assert [cell.name for cell in choose_cells(None, True, True)] == [cell.name for cell in CELLS]
    assert all(cell.drafter == "none" for cell in choose_cells(None, True, False))


def test_cells_that_cannot_be_are_refused() -> None:
    with pytest.raises(UnknownCellError, match="unknown cell 'fast'; choose from plain, "):
        choose_cells(["fast"], False, True)
    with pytest.raises(UnknownCellError, match="needs a diffusion drafter"):
        choose_cells(["default"], False, False)
