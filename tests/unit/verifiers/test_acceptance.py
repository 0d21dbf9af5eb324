"""Acceptance, for any draft and any draws."""

from hypothesis import given
from hypothesis import strategies as st

from verifiers.acceptance import accept

few_tokens = st.integers(0, 3)  # few, so that drafts often begin right


@st.composite
def drafts_and_draws(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    draft = draw(st.lists(few_tokens, max_size=8))
    return draft, draw(st.lists(few_tokens, min_size=len(draft) + 1, max_size=len(draft) + 1))


@given(drafts_and_draws())
def test_committed_tokens_are_the_targets_own_draws(case: tuple[list[int], list[int]]) -> None:
    draft, drawn = case
    verification = accept(draft, drawn)
    committed = [*draft[: verification.num_accepted], verification.next_token]
    assert committed == drawn[: len(committed)]


@given(drafts_and_draws())
def test_acceptance_ends_at_the_first_difference_and_not_before(case: tuple[list[int], list[int]]) -> None:
    draft, drawn = case
    num_accepted = accept(draft, drawn).num_accepted
    assert num_accepted == len(draft) or draft[num_accepted] != drawn[num_accepted]


@given(st.lists(few_tokens, max_size=8), few_tokens)
def test_perfect_draft_is_accepted_whole_with_one_bonus_token(draft: list[int], bonus: int) -> None:
    verification = accept(draft, [*draft, bonus])
    assert (verification.num_accepted, verification.next_token) == (len(draft), bonus)
