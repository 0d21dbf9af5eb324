"""The goodput policy: worth its cost or not at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafters.costs import KNOTS, BatchCosts, CostCurve, StepCosts
from drafters.goodput import choose_lengths, choose_sources, hysteresis

FLAT = {1: 1e-3, 64: 1e-3}  # rows are free, as on a GPU at small batches
LINEAR = {1: 1e-3, 64: 64e-3}  # every row costs a whole step


def costs(verify: dict[int, float], requests: int, draft: dict[int, float] | None = None) -> BatchCosts:
    table = StepCosts(verify, draft or {1: 1e-5, 64: 1e-4})
    table.search_seconds = table.overhead_seconds = 0.0
    return table.of_batch(requests)


def expected_accepted(rates: np.ndarray) -> np.ndarray:
    """By draft length, from each token's acceptance given that all before it are accepted."""
    return np.pad(np.cumprod(rates, axis=-1).cumsum(axis=-1), [(0, 0)] * (rates.ndim - 1) + [(1, 0)])


def constant_rates(requests: int, rate: float, longest: int = 16) -> np.ndarray:
    return expected_accepted(np.full((requests, longest), rate))


def caps(requests: int, longest: int = 16) -> np.ndarray:
    return np.full(requests, longest, dtype=np.int64)


def test_expected_accepted_sums_survival() -> None:
    assert expected_accepted(np.array([0.5, 0.5, 1.0])).tolist() == [0.0, 0.5, 0.75, 1.0]


def test_drafts_everything_when_rows_are_free() -> None:
    lengths = choose_lengths(constant_rates(3, 0.95), caps(3), 0, 0.0, costs(FLAT, 3))
    assert lengths.tolist() == [13, 13, 13] or min(lengths) > 8


def test_drafts_nothing_when_a_row_costs_a_step() -> None:
    assert choose_lengths(constant_rates(4, 0.9), caps(4), 0, 0.0, costs(LINEAR, 4)).tolist() == [0] * 4


def test_drafts_nothing_from_a_useless_drafter() -> None:
    assert choose_lengths(constant_rates(4, 0.01), caps(4), 0, 0.0, costs(FLAT, 4)).tolist() == [0] * 4


def test_a_request_costs_more_than_a_row() -> None:
    """Drafts cost what their rows do in a pass of few requests, however much its contexts add to a plain pass."""
    by_rows, by_requests = {1: 1e-3, 16: 2e-3, 32: 3e-3, 64: 5e-3}, {1: 1e-3, 4: 2e-3, 16: 8e-3}
    batch = StepCosts(by_rows, {1: 1e-3}, by_requests).of_batch(16)
    assert batch.plain_seconds == pytest.approx(8e-3)
    assert batch.verify_at(16) == pytest.approx(8e-3)
    assert batch.verify_at(32) == pytest.approx(9e-3)
    beside_a_prompt = StepCosts(by_rows, {1: 1e-3}, by_requests).of_batch(16, 16)
    assert beside_a_prompt.base_rows == 32
    assert beside_a_prompt.plain_seconds == pytest.approx(9e-3)


def test_draws_the_line_between_requests_of_one_batch() -> None:
    accepted = np.concatenate([constant_rates(1, 0.95), constant_rates(1, 0.02)])
    lengths = choose_lengths(accepted, caps(2), 0, 0.0, costs({1: 1e-3, 64: 8e-3}, 2))
    assert lengths[0] > 3
    assert lengths[1] == 0


@given(
    st.lists(st.floats(0.0, 0.99), min_size=1, max_size=5),
    st.floats(1e-5, 1e-2),
    st.integers(0, 12),
)
def test_single_request_gets_the_best_rate_by_brute_force(rates: list[float], slope: float, cap: int) -> None:
    """For one request coordinate ascent is exact up to the hysteresis: no length is better by more than that."""
    accepted = expected_accepted(np.array([(rates * 12)[:12]]))
    table = costs({1: 1e-3, 1024: 1e-3 + 1023 * slope}, 1)
    chosen = int(choose_lengths(accepted, np.array([cap]), 0, 0.0, table)[0])

    def rate(length: int) -> float:
        return float((1.0 + accepted[0, length]) / table.verify_at(1 + length))

    assert 0 <= chosen <= cap
    assert rate(chosen) >= max(rate(length) for length in range(cap + 1)) * 0.9
    assert rate(chosen) >= rate(0)


def test_a_diffusion_pass_is_not_paid_where_copying_does() -> None:
    copied = np.concatenate([constant_rates(1, 0.95), constant_rates(1, 0.05)])
    diffused = constant_rates(2, 0.7)
    table = costs({1: 1e-3, 64: 1.2e-3}, 2, {1: 2e-5, 64: 1e-4})
    assert choose_sources(copied, diffused, caps(2), np.full(2, 8.0), table).tolist() == [False, True]


def test_an_expensive_pass_is_never_paid() -> None:
    table = costs(FLAT, 2, {1: 1.0, 64: 1.0})
    assert not choose_sources(constant_rates(2, 0.1), constant_rates(2, 0.9), caps(2), np.full(2, 8.0), table).any()


def test_cost_curve_passes_through_its_measurements_and_extends_beyond() -> None:
    curve = CostCurve({1: 1.0, 4: 2.0, 16: 6.0})
    assert [curve.at(rows) for rows in (0, 1, 4, 16)] == pytest.approx([0.0, 1.0, 2.0, 6.0])
    assert curve.at(10) == pytest.approx(4.0, abs=0.01)
    assert curve.at(64) == pytest.approx(6.0 + 48 / 3)
    assert (np.diff(curve.seconds) >= 0).all()
    assert len(curve.seconds) == len(KNOTS)


def test_rows_do_not_look_free_when_there_was_no_time_to_measure_them() -> None:
    curve = CostCurve({1: 0.1})
    assert curve.at(1) == pytest.approx(0.1)
    assert curve.at(21) > 0.19


def test_cost_curve_follows_a_slower_machine_at_every_row_count() -> None:
    curve = CostCurve({1: 1e-3, 64: 10e-3})
    for _ in range(200):
        curve.observe(4, 3e-3)
    assert curve.at(4) == pytest.approx(3e-3, rel=0.1)
    assert curve.at(1) > 1.5e-3  # not visited, but the same machine


def test_cost_curve_shrugs_off_an_outlier() -> None:
    curve = CostCurve({1: 1e-3, 64: 10e-3})
    before = curve.at(1)
    curve.observe(1, 5.0)
    assert curve.at(1) < 1.2 * before


def test_plain_passes_that_are_not_seen_follow_the_machine_in_part() -> None:
    table = StepCosts({1: 1e-3, 64: 10e-3}, {1: 1e-3})
    for _ in range(300):
        table.observe_drafted(8, 1, 4e-3)
    assert table.of_batch(1).verify_at(8) == pytest.approx(4e-3, rel=0.05)
    assert 1.05e-3 < table.of_batch(1).plain_seconds < 1.3e-3
    for _ in range(100):
        table.observe_plain(1, 1e-3)
    assert table.of_batch(1).plain_seconds == pytest.approx(1e-3, rel=0.05)


def test_what_drafts_cost_by_themselves_is_not_put_down_to_plain_passes() -> None:
    table = StepCosts({1: 1e-3, 64: 1e-3}, {1: 1e-3})  # rows cost nothing, but to have drafts does
    for step in range(5_000):
        if step % 64:
            table.observe_drafted(8, 1, 1.5e-3)
        else:
            table.observe_plain(1, 1e-3)
    batch = table.of_batch(1)
    assert batch.verify_at(8) == pytest.approx(1.5e-3, rel=0.05)
    assert batch.plain_seconds == pytest.approx(1e-3, rel=0.05)
    assert 0.2 < table.verify.level < 5.0


def test_a_fuller_batch_asks_more_of_drafts() -> None:
    assert hysteresis(1) < hysteresis(4) < hysteresis(16) == hysteresis(64)


def test_the_first_search_of_all_does_not_set_the_price_of_searching() -> None:
    table = StepCosts({1: 1e-3}, {1: 1e-3})
    before = table.search_seconds, table.overhead_seconds
    table.observe_overheads(1, 0.5, 0.5)  # compiled code is read from disk, pages are touched
    assert table.search_seconds < 1.2 * before[0]
    assert table.overhead_seconds < 1.2 * before[1]
    for _ in range(300):
        table.observe_overheads(2, 6e-4, 1e-3)
    assert table.search_seconds == pytest.approx(3e-4, rel=0.05)
    assert table.overhead_seconds == pytest.approx(1e-3, rel=0.05)
