"""What is worth drafting: exploration within its share, and the better of two drafts."""

from dataclasses import replace

import numpy as np
import pytest

from drafters.base import Draft, DraftingCost, DraftRequest, Outcome, StepRecord
from drafters.candidate import Candidate, RequestState
from drafters.goodput import PASS_HYSTERESIS
from drafters.length import PaperLength, PaperLengthOptions
from drafters.planner import EXPLORATION, DraftPlanner, LengthOptions, num_common
from drafters.search.path_search import Path

STEP = 1e-3  # seconds
DEAR_DRAFTS = {1: 4e-3, 64: 8e-3}  # no pass is ever worth it


def planner() -> DraftPlanner:
    made = DraftPlanner(LengthOptions(max_draft_tokens=8))
    made.calibrate({1: STEP, 64: 4 * STEP}, DEAR_DRAFTS)
    return made


def candidate(name: str, state: RequestState | None = None) -> Candidate:
    request = DraftRequest(name, np.arange(20, dtype=np.int32), 8)
    return Candidate(request, state or RequestState(PaperLength(PaperLengthOptions()), heat=0), "goodput", cap=8)


def step(names: list[str], seconds: float = STEP) -> StepRecord:
    return StepRecord(
        outcomes=tuple(Outcome(name, Draft(), 0) for name in names),
        num_rows=len(names),
        num_prefill_rows=0,
        verify_seconds=seconds,
    )


def path(tokens: tuple[int, ...], confidence: float) -> Path:
    known = np.full(len(tokens), confidence)
    return Path(tokens, known, np.tile(known[:, None], 4), 0.0, 0.0, len(tokens), 1.0)


def test_exploring_takes_its_share_of_the_time_and_everybody_in_turn() -> None:
    plan = planner()
    names = ["a", "b", "c"]
    states = {name: RequestState(PaperLength(PaperLengthOptions()), heat=0) for name in names}
    passes = dict.fromkeys(names, 0)
    steps = 20_000
    for _ in range(steps):
        candidates = [candidate(name, states[name]) for name in names]
        plan.open_step(len(names), 0)
        plan.plan_diffusion(candidates, 6, lambda request: 2)
        explored = [c for c in candidates if c.diffusion_length]
        assert len(explored) <= 1
        for one in explored:
            passes[one.request.request_id] += 1
        plan.learn_costs(step(names))
    least = DEAR_DRAFTS[1]  # what a pass costs at the least
    assert 0.3 * EXPLORATION < sum(passes.values()) * least / (steps * STEP) <= EXPLORATION
    assert max(passes.values()) - min(passes.values()) <= 1


def test_what_a_step_cost_is_told_by_its_record_alone() -> None:
    """Records may be replayed, or tell of steps that never drafted: nothing of another step may be mixed in."""
    plan = planner()
    before = plan._costs.draft.at(7)
    drafted = replace(
        step(["a"]), drafting=DraftingCost(before + 5e-4, 3e-4, before, num_diffusion_rows=7, num_searches=2)
    )
    for _ in range(200):
        plan.learn_costs(drafted)
    assert plan._costs.draft.at(7) == pytest.approx(before)
    assert plan._costs.search_seconds == pytest.approx(1.5e-4, rel=1e-3)
    assert plan._costs.overhead_seconds == pytest.approx(5e-4, rel=1e-3)
    for _ in range(200):
        plan.learn_costs(step(["a"]))
    assert plan._costs.draft.at(7) == pytest.approx(before)
    assert plan._costs.search_seconds == pytest.approx(1.5e-4, rel=1e-3)


def test_a_pass_is_only_weighed_where_it_can_add_what_it_costs() -> None:
    """In plain tokens: 4 ms and a search against steps of a millisecond. Who rides along with others pays for rows."""
    plan = planner()
    alone = [candidate("a")]
    plan.open_step(1, 0)
    seconds = plan._batch.draft_at(6) + 1e-4
    expected = PASS_HYSTERESIS + (1 + PASS_HYSTERESIS) * seconds / (STEP + 2e-4)
    assert plan._least_gain(alone, 6) == pytest.approx(expected)
    sure = candidate("a")
    sure.tokens, sure.accepted = (1, 2, 3, 4), np.arange(9.0)
    assert plan._least_gain([sure], 6) > 3 * plan._least_gain(alone, 6)  # five tokens in little more than a plain step
    fixed = candidate("b")
    fixed.policy, fixed.diffusion_length = "fixed", 8
    assert plan._least_gain([*alone, fixed], 6) < 0.5 * plan._least_gain(alone, 6)


def test_a_path_that_promises_less_than_the_free_draft_is_dropped() -> None:
    plan = planner()
    one = candidate("a")
    one.tokens, one.confidences = (1, 2, 3), np.full(3, 0.9)
    one.take_path(path((7, 8), 0.3))
    plan.settle([one])
    assert one.path is None
    assert one.tokens == (1, 2, 3)


def test_a_path_that_promises_more_is_kept_and_what_it_gains_is_told_by_the_text() -> None:
    plan = planner()
    one = candidate("a")
    one.tokens, one.confidences = (1, 2, 3), np.full(3, 0.2)
    where = one.forecast_class
    one.take_path(path((1, 5, 6), 0.95))
    plan.settle([one])
    assert one.tokens == (1, 5, 6)
    draft = plan._draft(one, 3)
    assert draft.source == "diffusion"
    before = plan._forecast.gains(where).copy()
    for _ in range(30):  # the free draft would have been as right: only its first token is
        plan.learn(one.state, Outcome("a", draft, num_accepted=1))
    assert (plan._forecast.gains(where)[1:] < 0.3 * before[1:]).all()


def test_what_two_drafts_have_in_common() -> None:
    assert num_common((1, 2, 3), (1, 2, 4)) == 2
    assert num_common((1, 2), (1, 2, 4)) == 2
    assert num_common((), (1,)) == 0
    assert num_common((3,), (1,)) == 0


def test_free_drafts_go_on_as_long_as_a_row_may_be_worth_its_cost() -> None:
    plan = planner()  # a row costs a twentieth of a lone request's step

    def least(requests: int) -> float:
        plan.open_step(requests, 0)
        return plan.least_survival(requests)

    assert least(1) < 0.05
    assert 0.2 < least(16) < 0.5  # and a third of the seconds of a token in a full batch
    assert least(16) > least(4)
