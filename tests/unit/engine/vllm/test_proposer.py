"""The pipeline inside vLLM's worker: it learns from the verified tokens only, and forgets every request that leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from drafters.base import Draft, DraftingCost, DraftRequest, SearchFacts, StepRecord
from service.engine.vllm.proposer import Row, VllmProposer
from service.engine.vllm.records import RequestOptions, pack_record, unpack_records


class CopyingPipeline:
    """A real, if simple pipeline: repeats the last token."""

    max_draft_tokens = 4
    description, drafter_up, num_failures = "copies", True, 0
    last_cost = DraftingCost(0.25, 0.125, 0.0625, num_diffusion_rows=3, num_searches=2)

    def __init__(self) -> None:
        self.requests: list[DraftRequest] = []
        self.observed: list[StepRecord] = []
        self.released: list[str] = []
        self.calibrated: Mapping[int, float] = {}

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> list[Draft]:
        self.requests = list(requests)
        return [_copied(int(request.tokens[-1]), request.max_draft_tokens) for request in requests]

    def observe(self, step: StepRecord) -> None:
        self.observed.append(step)

    def release(self, request_id: str) -> None:
        self.released.append(request_id)

    def calibrate(self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None) -> None:
        self.calibrated = verify_seconds


def _copied(token: int, length: int) -> Draft:
    survival = tuple(0.5 ** (1 + i) for i in range(length))
    return Draft((token,) * length, "free", (0.5,) * length, survival=survival, search=SearchFacts(3, 1.5, 0.25))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def pipeline() -> CopyingPipeline:
    return CopyingPipeline()


@pytest.fixture
def proposer(pipeline: CopyingPipeline) -> VllmProposer:
    return VllmProposer(pipeline, 100, Clock())


def row(request_id: str, sampled: int = 1, verified: int = 0, left: int = 50, **options: object) -> Row:
    return Row(
        request_id=request_id,
        tokens=np.array([5, 6, 7], np.int32),
        num_sampled=sampled,
        num_verified=verified,
        num_rows=1 + verified,
        is_prefill=False,
        num_left=left,
        temperature=0.0,
        options=RequestOptions(name=f"our-{request_id}", **options),  # type: ignore[arg-type]
    )


def test_a_draft_that_the_scheduler_cut_counts_as_what_was_left(
    proposer: VllmProposer, pipeline: CopyingPipeline
) -> None:
    proposer.begin([], ["a"])
    assert proposer.propose([row("a")]) == [[7] * 4]
    proposer.begin([], ["a"])
    proposer.propose([row("a", sampled=3, verified=2)])
    (outcome,) = pipeline.observed[-1].outcomes
    assert outcome.draft.tokens == (7, 7)
    assert outcome.draft.confidences == (0.5, 0.5)
    assert outcome.draft.survival == (0.5, 0.25)
    assert outcome.num_accepted == 2
    assert outcome.next_token == 7
    proposer.begin([], ["a"])
    proposer.propose([row("a")])
    (outcome,) = pipeline.observed[-1].outcomes
    assert (outcome.draft.tokens, outcome.draft.bypass_reason) == ((), "scheduler")


def test_drafts_leave_room_for_the_token_that_a_step_adds(proposer: VllmProposer) -> None:
    proposer.begin([], "abcd")
    rows = [row("a", left=3), row("b", left=1), row("c", enabled=False), row("d", max_draft_tokens=1)]
    assert proposer.propose(rows) == [[7, 7], [], [], [7]]


def test_requests_whose_prompt_is_still_read_are_not_drafted_for(
    proposer: VllmProposer, pipeline: CopyingPipeline
) -> None:
    proposer.begin([], "ab")
    assert proposer.propose([row("a", sampled=0), row("b")]) == [[], [7] * 4]
    assert [request.request_id for request in pipeline.requests] == ["b"]
    assert [outcome.request_id for outcome in pipeline.observed[-1].outcomes] == ["b"]


def test_whoever_leaves_is_released_once(proposer: VllmProposer, pipeline: CopyingPipeline) -> None:
    proposer.begin([], "ab")
    proposer.propose([row("a"), row("b")])
    proposer.begin(["a", "never seen"], ["b"])
    proposer.begin(["a"], ["b"])
    assert pipeline.released == ["a"]


def test_time_between_steps_counts_only_while_somebody_waits(proposer: VllmProposer, pipeline: CopyingPipeline) -> None:
    proposer.begin([], ["a"])
    proposer.propose([row("a")])
    proposer.begin([], ["a"])
    proposer.propose([row("a")])
    assert pipeline.observed[-1].commit_seconds == 1.0
    assert pipeline.observed[-1].verify_seconds == 1.0
    assert pipeline.observed[-1].seconds.draft == 0.25
    proposer.begin(["a"], ["b"])
    proposer.propose([row("b")])
    assert pipeline.observed[-1].commit_seconds == 0.0


def test_records_and_traces_carry_the_services_names(proposer: VllmProposer) -> None:
    for _ in range(2):
        proposer.begin([], ["a"])
        proposer.propose([row("a", sampled=2, verified=4, trace=True)])
    records = proposer.take_records()
    assert {outcome.request_id for record in records for outcome in record.outcomes} == {"our-a"}
    assert proposer.trace_of("our-a")[-1] == ("free", [7] * 4, 1)
    assert proposer.trace_of("other") == []
    assert proposer.take_records() == []


def test_skipped_steps_are_recorded_but_not_drafted_for(proposer: VllmProposer, pipeline: CopyingPipeline) -> None:
    proposer.begin([], ["a"])
    proposer.skip([row("a")])
    assert pipeline.observed == []
    (record,) = proposer.take_records()
    assert record.outcomes[0].draft.bypass_reason == "drafter_failed"


def test_a_call_that_failed_leaves_no_draft_behind() -> None:
    class Broken(CopyingPipeline):
        def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> list[Draft]:
            return [None] * len(requests)  # type: ignore[list-item]

    proposer = VllmProposer(Broken(), 100, Clock())
    proposer.begin([], ["a"])
    with pytest.raises(AttributeError):
        proposer.propose([row("a")])
    proposer.begin([], ["a"])
    proposer.skip([row("a")])
    assert proposer.take_records()[-1].outcomes[0].draft.bypass_reason == "drafter_failed"


def test_probes_set_the_costs_and_stay_out_of_the_records(proposer: VllmProposer, pipeline: CopyingPipeline) -> None:
    for drafted in (0, 3):
        for _ in range(4):
            proposer.begin([], ["a"])
            proposer.propose([row("a", verified=drafted, probe=drafted)])
    assert proposer.calibrate() == pipeline.calibrated == {1: 1.0, 4: 1.0}
    assert proposer.take_records() == []


def test_a_record_survives_the_way_between_processes(proposer: VllmProposer) -> None:
    for _ in range(2):
        proposer.begin([], ["a"])
        proposer.propose([row("a", sampled=2, verified=4)])
    for record in proposer.take_records():
        (again,) = unpack_records([pack_record(record)])
        assert (again.seconds, again.drafting) == (record.seconds, record.drafting)
        assert again.num_rows == record.num_rows
        for one, other in zip(again.outcomes, record.outcomes, strict=True):
            assert one == replace(other, draft=replace(other.draft, confidences=()))
