import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.bench.records import DraftedStep, Mismatch, find_mismatches, first_difference
from service.bench.summary import Spread, looping_share, repeated_share, summarize
from tests.unit.bench.recorded import LOOP, VARIED, one_pass, plain_steps, record


def test_speed_ups_are_medians_over_pairs() -> None:
    plain, copy, fast = summarize(record())
    assert plain.speed_up is None
    assert copy.speed_up == Spread(2.0, 2.0, 2.0, 4)
    assert fast.speed_up is not None
    assert (fast.speed_up.lower, fast.speed_up.median, fast.speed_up.upper) == (2.0, 3.0, 4.0)


def test_the_total_weighs_pairs_by_their_seconds() -> None:
    fast = summarize(record())[2]
    assert fast.total_speed_up == pytest.approx((2 + 4 + 6 + 8) / (0.5 + 1 + 3 + 4))
    assert fast.tokens_per_second == pytest.approx(4 * 18 / 8.5)


def test_free_drafts_are_a_baseline_of_their_own() -> None:
    plain, copy, fast = summarize(record())
    assert plain.free_speed_up is None
    assert copy.free_speed_up is None
    assert fast.free_speed_up is not None
    assert fast.free_speed_up.median == 1.5


def test_looping_continuations_stand_apart() -> None:
    assert repeated_share(LOOP) == pytest.approx(8 / 11)
    assert repeated_share(VARIED) == 0
    assert looping_share(record()) == 0.5
    fast = summarize(record())[2]
    assert fast.looping_speed_up == Spread.of([4.0, 2.0])
    assert fast.other_speed_up == Spread.of([4.0, 2.0])
    assert fast.looping_acceptance.num_steps + fast.other_acceptance.num_steps == fast.acceptance.num_steps


def test_acceptance_counts_the_extra_token_once_per_step() -> None:
    plain, copy, _ = summarize(record())
    assert plain.acceptance.length == 1.0
    assert plain.acceptance.length_when_drafted is None
    steps = [s for entry in record().of("free") for generation in entry.generations for s in generation.steps]
    made = sum(step.num_accepted + 1 for step in steps)
    assert made == 4 * 17
    assert copy.acceptance.length == pytest.approx(made / len(steps))
    assert copy.acceptance.rate == pytest.approx((made - len(steps)) / sum(step.num_drafted for step in steps))


def test_positions_count_only_drafts_that_reach_them() -> None:
    copy = summarize(record())[1]
    long, short = copy.draft_lengths[4], copy.draft_lengths[2]
    assert copy.drafted_by_position == (long + short, long + short, long, long)
    assert copy.accepted_by_position[3] == 0
    assert copy.accepted_by_position[0] <= long
    assert copy.sources == {
        "free": pytest.approx(long / (long + short)),
        "diffusion": pytest.approx(short / (long + short)),
    }


def test_phases_add_up_to_the_seconds() -> None:
    for summary in summarize(record()):
        assert summary.phases is not None
        assert summary.phases.total == pytest.approx(summary.seconds)
        assert summary.search_share == pytest.approx(0.1)


def test_near_ties_are_not_failures() -> None:
    failure = Mismatch("free", 0, "prompt-0", 3, 1, 2, 0.5)
    near_tie = Mismatch("free", 1, "prompt-1", 3, 1, 2, 1e-5, is_near_tie=True)
    copy = summarize(record((failure, near_tie)))[1]
    assert (copy.num_mismatches, copy.num_near_ties) == (1, 1)


tokens = st.lists(st.integers(0, 3), max_size=6).map(tuple)


@given(tokens, tokens)
def test_the_first_difference_is_where_common_prefixes_end(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    position = first_difference(left, right)
    if position is None:
        assert left == right
    else:
        assert left[:position] == right[:position]
        assert left[position : position + 1] != right[position : position + 1]


def test_a_shorter_continuation_is_a_mismatch() -> None:
    whole = one_pass("plain", 0, VARIED, 1.0, plain_steps(VARIED))
    short = one_pass("free", 0, VARIED[:-1], 1.0, (DraftedStep("free", 1, 1),))
    (mismatch,) = find_mismatches(whole, short)
    assert (mismatch.position, mismatch.expected, mismatch.found) == (17, 17, None)
    assert find_mismatches(whole, whole) == []


@given(st.lists(st.floats(0.1, 10), min_size=1))
def test_quartiles_enclose_the_median(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread is not None
    assert min(values) <= spread.lower <= spread.median <= spread.upper <= max(values)
