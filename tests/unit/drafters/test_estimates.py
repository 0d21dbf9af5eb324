"""What is learned of drafts while serving."""

import numpy as np
import pytest

from drafters.estimates import Agreement, Calibration, DiffusionForecast, temperature_class


def test_calibration_learns_how_often_a_confidence_is_right() -> None:
    calibration = Calibration()
    confidences = np.array([0.9, 0.9, 0.9])
    for _ in range(400):
        calibration.observe(confidences, 1, heat=1)  # one right, one wrong, the third never reached: half
    assert calibration.estimate(np.array([0.9]), 1)[0] == pytest.approx(0.5, abs=0.15)
    assert calibration.estimate(np.array([0.1]), 1)[0] < 0.2  # other confidences are untouched
    assert calibration.estimate(np.array([0.9]), 0)[0] > 0.8  # and other temperatures


def test_calibration_forgets_a_confidence_that_is_never_right() -> None:
    calibration = Calibration()
    for _ in range(400):
        calibration.observe(np.array([0.97]), 0, heat=0)
    assert calibration.estimate(np.array([0.97]), 0)[0] < 0.02


@pytest.mark.parametrize(("temperature", "heat"), [(0.0, 0), (0.2, 1), (0.6, 1), (0.8, 2), (1.2, 3)])
def test_temperatures_have_classes(temperature: float, heat: int) -> None:
    assert temperature_class(temperature) == heat


def test_agreement_returns_to_the_prior_without_drafts() -> None:
    agreement = Agreement()
    for _ in range(20):
        agreement.observe(0, 5.0)
    assert agreement.factor < 0.2
    for _ in range(100):
        agreement.forget()
    assert agreement.factor == pytest.approx(1.0, abs=0.02)


def test_the_forecast_is_the_mean_of_what_such_passes_added() -> None:
    forecast = DiffusionForecast(longest=4)
    one, other = forecast.classes(0, 0.1), forecast.classes(2, 0.1)
    before = forecast.gains(other).tolist()
    for _ in range(300):
        forecast.observe(one, np.array([0.0, 0.8, 1.2, 1.2, 1.2]), 4)
        forecast.observe(one, np.array([0.0, 0.4, 0.4, 0.4, 0.4]), 4)
    assert forecast.gains(one) == pytest.approx([0.0, 0.6, 0.8, 0.8, 0.8], abs=0.05)
    assert forecast.gains(other).tolist() == before


def test_before_anything_is_known_a_pass_adds_the_less_the_more_the_free_draft_promises() -> None:
    forecast = DiffusionForecast(longest=8)
    gains = [forecast.gains(forecast.classes(0, promise))[8] for promise in (0.1, 0.6, 1.2, 3.0, 9.0)]
    assert gains[0] > 1.0
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] == 0.0


def test_requests_that_may_draft_little_say_nothing_of_longer_drafts() -> None:
    forecast = DiffusionForecast(longest=4)
    where = forecast.classes(0, 0.1)
    before = forecast.gains(where)
    for _ in range(100):
        forecast.observe(where, np.array([0.0, 0.9, 0.9, 0.9, 0.9]), 1)
    after = forecast.gains(where)
    assert after[1] == pytest.approx(0.9, abs=0.02)
    assert after[2:] == pytest.approx(before[2:])


def test_gains_that_do_not_come_true_are_expected_no_more() -> None:
    forecast = DiffusionForecast(longest=4)
    where = forecast.classes(0, 0.1)
    before = forecast.gains(where)[4]
    for _ in range(100):
        forecast.verify(where, gained=0.2, expected=0.8)
    assert forecast.gains(where)[4] == pytest.approx(before / 3, rel=0.4)
    for _ in range(100):
        forecast.verify(where, gained=0.8, expected=0.8)
    assert forecast.gains(where)[4] == pytest.approx(before, rel=0.1)


def test_accepted_tokens_add_up_over_two_sources() -> None:
    """A searched path, and what the free draft puts after it, each by its own calibration."""
    calibration = Calibration(1.0)
    accepted = np.empty(6)
    survival = calibration.accumulate(np.array([0.5, 0.5]), 0, 1.0, accepted)
    assert accepted.tolist() == pytest.approx([0.0, 0.5, 0.75, 0.75, 0.75, 0.75])
    assert survival == pytest.approx(0.25)
    survival = calibration.accumulate(np.array([0.8]), 0, 1.0, accepted, 2, survival)
    assert accepted.tolist() == pytest.approx([0.0, 0.5, 0.75, 0.95, 0.95, 0.95])
    assert survival == pytest.approx(0.2)
