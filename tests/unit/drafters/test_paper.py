"""The paper's adaptive draft length, step by step."""

import pytest

from drafters.policy.paper import PaperLength, PaperOptions


def test_starts_at_the_longest_and_falls_to_the_shortest_after_a_poor_step() -> None:
    length = PaperLength(PaperOptions())
    assert length.next_length == 30
    length.observe(generated=30, accepted=4)  # averages 15 and 2: 15 is below the shortest
    assert length.next_length == 20


def test_follows_equations_9_to_11_by_hand() -> None:
    length = PaperLength(PaperOptions(min_length=1, max_length=100, increment=10, ema_rate=0.5))
    length.observe(generated=20, accepted=20)  # averages 10, 10: growth
    assert length.next_length == 20
    length.observe(generated=20, accepted=4)  # averages 15, 7: none
    assert length.next_length == 15
    length.observe(generated=2, accepted=12)  # averages 8.5, 9.5: growth, rounded down
    assert length.next_length == 18


@pytest.mark.parametrize("accepted", [0, 5, 30])
def test_stays_between_its_bounds(accepted: int) -> None:
    length = PaperLength(PaperOptions())
    for _ in range(50):
        length.observe(generated=30, accepted=accepted)
        assert 20 <= length.next_length <= 30
    assert length.next_length == (30 if accepted == 30 else 29 if accepted < 30 else 0)
