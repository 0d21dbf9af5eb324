"""The policy: drafts that are worth their cost, or none; every request by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafters.base import Draft, DraftingCost, DraftRequest, Outcome, PolicyName, SearchFacts, StepRecord
from drafters.policy import Policy, PolicyOptions
from drafters.policy.acceptance import Acceptance, RequestFactor, temperature_class
from drafters.policy.gains import PRIOR_GAIN
from drafters.policy.learning import EXPLORE_SHARE, Exploring
from drafters.policy.policy import MIN_GAIN
from drafters.policy.seconds import StepSeconds

STEP = 1e-3  # seconds
FREE_ROWS = {1: STEP, 64: STEP}  # rows cost nothing, as on a GPU at small batches
SOME_ROWS = {1: STEP, 64: 8 * STEP}
DEAR_ROWS = {1: STEP, 64: 64 * STEP}  # every row costs a whole step
CHEAP_PASS, DEAR_PASS = {1: 2e-5, 64: 1e-4}, {1: 4 * STEP, 64: 8 * STEP}


def make(verify: Mapping[int, float] = SOME_ROWS, passes: Mapping[int, float] | None = None) -> Policy:
    policy = Policy(PolicyOptions())
    policy.calibrate(verify, passes)
    return policy


def ask(
    name: str, policy: PolicyName | None = None, limit: int = 32, temperature: float = 0.0, length: int = 20
) -> DraftRequest:
    return DraftRequest(name, np.arange(length, dtype=np.int32), limit, policy, temperature)


def free(confidence: float, length: int = 16) -> Draft:
    return Draft(tuple(range(length)), "free", (confidence,) * length)


def path(tokens: Sequence[int], confidence: float, promised: float = 0.0) -> Draft:
    facts = SearchFacts(raw_length=len(tokens), lattice_width=2.0, promised=promised)
    return Draft(tuple(tokens), "diffusion", (confidence,) * len(tokens), len(tokens), search=facts)


def lengths(policy: Policy, requests: Sequence[DraftRequest], drafts: Sequence[Draft], prefill: int = 0) -> list[int]:
    """How much of each free draft one step verifies; nothing of those that rest."""
    drafting = policy.open_step(requests, prefill)
    if not drafting:
        return [0] * len(requests)
    given_drafts = {request.request_id: draft for request, draft in zip(requests, drafts, strict=True)}
    weighed = policy.weigh(drafting, [given_drafts[request.request_id] for request in drafting])
    chosen = policy.choose(drafting, weighed, [None] * len(drafting))
    found = {request.request_id: draft for request, draft in zip(drafting, chosen, strict=True)}
    return [len(found[each.request_id].tokens) if each.request_id in found else 0 for each in requests]


def record(
    outcomes: Sequence[Outcome], seconds: float = STEP, prefill: int = 0, cost: DraftingCost | None = None
) -> StepRecord:
    rows = len(outcomes) + prefill + sum(len(outcome.draft.tokens) for outcome in outcomes)
    return StepRecord(outcomes, rows, prefill, cost or DraftingCost(), verify_seconds=seconds)


# Acceptance


def test_acceptance_learns_how_often_a_confidence_is_right() -> None:
    acceptance = Acceptance()
    draft = free(0.9, 3)
    for _ in range(400):
        acceptance.observe([draft], [1], [1])  # one right, one wrong, the third never reached: half

    def rate(confidence: float, where: int) -> float:
        return acceptance.survival([free(confidence, 1)], [where], [1.0])[0][0]

    assert rate(0.9, 1) == pytest.approx(0.5, abs=0.15)
    assert rate(0.1, 1) < 0.2  # other confidences are untouched
    assert rate(0.9, 0) > 0.8  # and other temperatures
    for _ in range(400):
        acceptance.observe([free(0.97, 1)], [0], [0])
    assert rate(0.97, 0) < 0.02


@pytest.mark.parametrize(("temperature", "where"), [(0.0, 0), (0.2, 1), (0.6, 1), (0.8, 2), (1.2, 3)])
def test_temperatures_have_classes(temperature: float, where: int) -> None:
    assert temperature_class(temperature) == where


def test_survival_multiplies_over_both_sources_of_a_draft() -> None:
    acceptance = Acceptance()
    for _ in range(600):
        acceptance.observe([path([1], 0.5)], [0], [0])  # searched tokens of this confidence are never right
    mixed = replace(path([1, 2], 0.5), tokens=(1, 2, 3), confidences=(0.5, 0.5, 0.5), num_searched=0)
    survival = acceptance.survival([mixed, replace(mixed, num_searched=2)], [0, 0], [1.0, 1.0])
    assert survival[0] == pytest.approx([0.5, 0.25, 0.125])
    assert max(survival[1][:2]) < 0.01
    assert acceptance.survival([mixed], [0], [0.5])[0] == pytest.approx([0.25, 0.0625, 0.015625])
    assert acceptance.survival([Draft(), free(0.5, 2)], [0, 0], [1.0, 1.0]) == [[], [0.5, 0.25]]


def test_a_requests_factor_returns_to_one_without_drafts() -> None:
    factor = RequestFactor()
    for _ in range(20):
        factor.observe(0, 5.0)
    assert factor.value < 0.2
    for _ in range(200):
        factor.observe(0.0, 0.0)
    assert factor.value == pytest.approx(1.0, abs=0.02)


def test_a_draft_that_was_cut_on_its_way_teaches_only_what_was_verified() -> None:
    """vLLM's scheduler cuts drafts: two tokens of eight verified and accepted are two right ones and no wrong one."""
    policy, request = make(), ask("a")
    for _ in range(300):
        drafting = policy.open_step([request], 0)
        for draft in policy.weigh(drafting, [free(0.9, 8)] * len(drafting)):
            policy.observe(record([Outcome("a", draft.cut(2, "scheduler"), 2)]))
    assert policy.weigh([request], [free(0.9, 8)])[0].expected_accepted > 6.5


# Seconds


def test_the_curve_passes_through_its_measurements_and_goes_on_beyond() -> None:
    seconds = StepSeconds({1: 1.0, 4: 2.0, 16: 6.0}, {1: 1.0})
    found = seconds.drafted(1, 0, 64)
    assert found[[1, 4, 10, 16, 64]].tolist() == pytest.approx([1.0, 2.0, 4.0, 6.0, 6.0 + 48 / 3])
    assert StepSeconds({1: 0.1}, {1: 1.0}).drafted(1, 1, 20)[20] > 0.19  # rows do not look free unmeasured
    assert seconds.diffusion(np.array([0, 1])).tolist() == [0.0, 1.0]


def test_a_request_costs_more_than_a_row() -> None:
    """Drafts cost what their rows do in a pass of few requests, however much its contexts add to a plain pass."""
    by_rows, by_requests = {1: 1e-3, 16: 2e-3, 32: 3e-3, 64: 5e-3}, {1: 1e-3, 4: 2e-3, 16: 8e-3}
    seconds = StepSeconds(by_rows, {1: 1e-3}, by_requests)
    assert seconds.plain(16, 16) == pytest.approx(8e-3)
    assert seconds.drafted(16, 16, 16)[[0, 16]].tolist() == pytest.approx([8e-3, 9e-3])
    assert seconds.plain(16, 32) == pytest.approx(9e-3)  # sixteen prompt rows beside them
    assert seconds.row(1, 1) > 0


def test_each_kind_of_step_has_its_own_ratio() -> None:
    seconds = StepSeconds(SOME_ROWS, {1: STEP})
    drafted = Outcome("a", free(0.9, 7), 3)
    for _ in range(300):
        seconds.observe(record([drafted], 4e-3))
    assert seconds.drafted(1, 1, 7)[7] == pytest.approx(4e-3, rel=0.05)
    assert seconds.plain(1, 1) == pytest.approx(STEP)
    for step in range(300):  # few plain steps among many others are enough
        seconds.observe(record([drafted], 4e-3) if step % 20 else record([Outcome("a", Draft(), 0)], 1.5e-3))
    assert seconds.plain(1, 1) == pytest.approx(1.5e-3, rel=0.1)


def test_one_slow_step_hardly_counts() -> None:
    seconds = StepSeconds(SOME_ROWS, {1: STEP})
    seconds.observe(record([Outcome("a", Draft(), 0)], 5.0))
    assert seconds.plain(1, 1) < 1.2 * STEP


def test_prompt_rows_teach_nothing_about_drafts() -> None:
    seconds = StepSeconds(SOME_ROWS, {1: STEP})
    for _ in range(300):
        seconds.observe(record([Outcome("a", free(0.9, 7), 3)], 1.0, prefill=64))
    assert seconds.drafted(1, 1, 0)[0] == pytest.approx(STEP)


def test_the_first_search_of_all_does_not_set_the_price_of_searching() -> None:
    seconds = StepSeconds(SOME_ROWS, {1: STEP})
    before = seconds.search, seconds.overhead
    seconds.observe(record([], cost=DraftingCost(0.5, 0.5, num_searches=1)))  # compiled code is read, pages are touched
    assert seconds.search < 1.2 * before[0]
    assert seconds.overhead < 1.2 * before[1]
    for _ in range(500):
        seconds.observe(record([], cost=DraftingCost(1.5e-3, 6e-4, 5e-4, num_diffusion_rows=1, num_searches=2)))
    assert seconds.search == pytest.approx(3e-4, rel=0.05)
    assert seconds.overhead == pytest.approx(1e-3, rel=0.05)
    assert seconds.diffusion(np.array([1]))[0] == pytest.approx(5e-4, rel=0.05)


# Lengths


def test_drafts_everything_when_rows_are_free() -> None:
    requests = [ask(name) for name in "abc"]
    assert min(lengths(make(FREE_ROWS), requests, [free(0.95)] * 3)) > 12


@pytest.mark.parametrize(("verify", "confidence"), [(DEAR_ROWS, 0.9), (FREE_ROWS, 0.001)])
def test_drafts_nothing_where_rows_are_dear_or_drafts_useless(verify: Mapping[int, float], confidence: float) -> None:
    requests = [ask(name) for name in "abcd"]
    assert lengths(make(verify), requests, [free(confidence)] * 4) == [0] * 4


def test_draws_the_line_between_requests_of_one_batch() -> None:
    long, short = lengths(make(), [ask("a"), ask("b")], [free(0.95), free(0.02)])
    assert long > 3
    assert short == 0


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12), st.floats(1e-5, 1e-2), st.integers(1, 4))
def test_no_lengths_promise_more_tokens_per_second(rates: list[float], slope: float, requests: int) -> None:
    """Compared with every number of rows, given to the tokens of a batch that survive best."""
    policy = make({1: STEP, 1024: STEP + 1023 * slope})
    asked = [ask(str(i)) for i in range(requests)]
    drafts = policy.weigh(
        asked, [Draft(tuple(range(len(rates))), "free", tuple(rates[i:] + rates[:i])) for i in range(requests)]
    )
    policy.open_step(asked, 0)
    chosen = policy.choose(asked, drafts, [None] * requests)
    survival = sorted((value for draft in drafts for value in draft.survival), reverse=True)

    def rate(values: Sequence[float]) -> float:
        seconds = policy._seconds.drafted(requests, requests, len(values))[-1]
        return (requests + sum(values)) / (seconds + policy._seconds.overhead)

    best = max(rate(survival[:count]) for count in range(len(survival) + 1))
    found = rate([value for draft in chosen for value in draft.survival])
    assert found >= best / (1.0 + MIN_GAIN) - 1e-6


def test_a_batch_of_more_rows_than_any_curve_has_is_drafted_for() -> None:
    """600 requests with 32 tokens each: more rows than the cost of a pass is known for."""
    requests = [ask(str(i)) for i in range(600)]
    found = lengths(make({1: STEP, 64: 1.01 * STEP}), requests, [free(0.99, 32)] * 600)
    assert min(found) > 8


def test_a_draft_is_cut_where_its_request_ends() -> None:
    policy, request = make(FREE_ROWS), ask("a", "fixed")
    assert lengths(policy, [request], [free(0.1)]) == [8]
    assert lengths(policy, [ask("b", "paper")], [free(0.1, 32)]) == [30]


# Everybody by themselves


def drafted_over(policy: Policy, requests: Sequence[DraftRequest], steps: int, prefill: int = 0) -> Mapping[str, float]:
    """Mean draft length of each request over steps in which all drafts are accepted, for rows that cost something."""
    totals = dict.fromkeys((request.request_id for request in requests), 0)
    for _ in range(steps):
        found = lengths(policy, requests, [free(0.9)] * len(requests), prefill)
        outcomes = [
            Outcome(request.request_id, free(0.9).cut(length), length, request.policy)
            for request, length in zip(requests, found, strict=True)
        ]
        rows = sum(found)
        policy.observe(record(outcomes, STEP + rows * STEP / 30, prefill))
        for request, length in zip(requests, found, strict=True):
            totals[request.request_id] += length
    return {name: total / steps for name, total in totals.items()}


@pytest.mark.parametrize("other", ["fixed", "paper"])
def test_a_request_with_a_policy_of_its_own_turns_off_nobody(other: PolicyName) -> None:
    alone = drafted_over(make(), [ask("a")], 500)["a"]
    beside = drafted_over(make(), [ask("a"), ask("b", other)], 500)["a"]
    assert alone > 8
    assert beside > 0.9 * alone


def test_requests_of_all_policies_draft_in_one_batch_as_they_would_alone() -> None:
    batch = [ask("a"), ask("b", "fixed"), ask("c", "paper"), ask("d", limit=0), ask("e", temperature=0.8)]
    found = drafted_over(make(), batch, 300)
    for request in batch:
        alone = drafted_over(make(), [request], 300)[request.request_id]
        assert found[request.request_id] == pytest.approx(alone, rel=0.15), request.request_id


def test_drafting_goes_on_beside_the_reading_of_long_prompts() -> None:
    policy = make()
    drafted_over(policy, [ask("a")], 200)
    assert drafted_over(policy, [ask("a")], 500, prefill=64)["a"] > 8


# Staleness


def test_exploring_takes_its_share_of_the_time() -> None:
    exploring = Exploring()
    tried = {"cheap": 0, "dear": 0}
    for _ in range(100_000):
        for kind, price in (("cheap", 1e-4), ("dear", 4e-3)):
            tried[kind] += exploring.is_due(kind, price)
        exploring.pass_time(STEP)
    for kind, price in (("cheap", 1e-4), ("dear", 4e-3)):
        assert tried[kind] * price == pytest.approx(100_000 * STEP * EXPLORE_SHARE, rel=0.05)


def test_nobody_explores_what_is_seen_anyway() -> None:
    exploring = Exploring()
    for _ in range(100_000):
        assert not exploring.is_due("pass", 1e-3)
        exploring.saw("pass")
        exploring.pass_time(STEP)


def test_drafts_that_are_never_worth_it_cost_a_small_share_of_the_time() -> None:
    policy, requests = make(DEAR_ROWS), [ask(name, temperature=1.2) for name in "abcd"]
    spent = total = 0.0
    for _ in range(4000):
        found = lengths(policy, requests, [free(0.1)] * 4)
        seconds = 4 * STEP + sum(found) * STEP
        outcomes = [
            Outcome(each.request_id, free(0.1).cut(length), 0) for each, length in zip(requests, found, strict=True)
        ]
        policy.observe(record(outcomes, seconds))
        spent, total = spent + sum(found) * STEP, total + seconds
    assert 0.0 < spent < 2 * EXPLORE_SHARE * total


# Diffusion passes


def ask_passes(
    policy: Policy, requests: Sequence[DraftRequest], drafts: Sequence[Draft], pending: int = 4
) -> list[int]:
    drafting = policy.open_step(requests, 0)
    assert len(drafting) == len(requests)
    return policy.pass_lengths(drafting, policy.weigh(drafting, drafts), [pending] * len(requests), 8)


def test_before_anything_is_known_a_cheap_pass_is_tried_and_a_dear_one_is_not() -> None:
    assert ask_passes(make(SOME_ROWS, CHEAP_PASS), [ask("a")], [Draft()]) == [6]
    assert ask_passes(make(SOME_ROWS, DEAR_PASS), [ask("a")], [Draft()]) == [0]
    assert PRIOR_GAIN > 0


def test_other_policies_take_a_pass_whatever_it_costs() -> None:
    requests = [ask("a"), ask("b", "fixed"), ask("c", "paper"), ask("d", "fixed", limit=2)]
    assert ask_passes(make(SOME_ROWS, DEAR_PASS), requests, [Draft()] * 4) == [0, 8, 8, 2]


def test_a_pass_serves_those_for_whom_it_really_added_tokens() -> None:
    """Where free drafts promise much, passes added nothing; where they promise little, they did."""
    policy = make(FREE_ROWS, CHEAP_PASS)
    sure, unsure = free(0.97, 8), free(0.1, 8)
    for _ in range(200):
        for own, added in ((sure, 0), (unsure, 2)):
            requests = [ask("a")]
            policy.open_step(requests, 0)
            (weighed,) = policy.weigh(requests, [own])
            found = replace(path(range(10, 14), 0.9, weighed.expected_accepted), free=())
            policy.observe(record([Outcome("a", found, added)]))
    assert ask_passes(policy, [ask("b"), ask("c")], [sure, unsure]) == [0, 6]


def test_a_pass_that_the_free_draft_would_have_been_as_right_without_adds_nothing() -> None:
    policy = make(SOME_ROWS, CHEAP_PASS)
    found = replace(path([1, 5, 6], 0.95), free=(1, 2, 3))
    ask_passes(policy, [ask("a")], [Draft()])
    for _ in range(300):  # the target draws 2 behind the accepted 1, as the free draft had it
        policy.observe(record([Outcome("a", found, num_accepted=1, next_token=2)]))
    assert ask_passes(policy, [ask("b")], [Draft()]) == [0]


@pytest.mark.parametrize("change", [{"policy": "fixed"}, {"is_cut": True}])
def test_only_what_goodput_chose_and_saw_whole_tells_what_a_pass_adds(change: Mapping[str, Any]) -> None:
    """`fixed` verifies paths that `goodput` would drop, and vLLM's scheduler cuts drafts: neither is a failed pass."""
    policy = make(SOME_ROWS, CHEAP_PASS)
    ask_passes(policy, [ask("a")], [Draft()])
    for _ in range(300):
        outcome = Outcome("a", replace(path([1, 5, 6], 0.95), free=(2, 3)), num_accepted=0, next_token=2)
        policy.observe(record([replace(outcome, **change)]))
    assert ask_passes(policy, [ask("b")], [Draft()]) == [6]


def test_the_better_of_two_drafts_is_verified_and_remembers_the_other() -> None:
    policy, requests = make(FREE_ROWS), [ask("a"), ask("b"), ask("c", "fixed"), ask("d", "fixed")]
    own = policy.weigh(requests, [free(0.9, 3), free(0.1, 3), free(0.9, 3), free(0.9, 3)])
    nothing = Draft(search=SearchFacts(), bypass_reason="no_candidates")
    found = policy.weigh(requests, [path([7, 8], 0.3), path([7, 8], 0.9), path([7, 8], 0.3), nothing])
    policy.open_step(requests, 0)
    kept, taken, fixed, none = policy.choose(requests, own, found)
    assert (kept.source, kept.tokens) == ("free", (0, 1, 2))
    assert kept.search is not None  # a pass was had, and added nothing
    assert (taken.source, taken.tokens, taken.free) == ("diffusion", (7, 8), (0, 1, 2))
    assert (fixed.source, fixed.tokens) == ("diffusion", (7, 8))
    assert (none.source, none.tokens) == ("free", (0, 1, 2))
