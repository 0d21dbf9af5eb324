"""A step commits exactly the tokens that plain decoding would have given."""

from collections.abc import Sequence

import pytest

from drafters.base import Draft
from service.engine.base import GenerationRequest, SpeculationOptions
from service.engine.sequence import Decoding
from verifiers.base import SamplingRules, TokenLogprobs, Verification, VerifyResult

STOP = 9


def decoding(max_tokens: int = 10, include_stop_token: bool = False, stops: Sequence[int] = (STOP,)) -> Decoding:
    request = GenerationRequest(
        "r",
        [1, 2, 3],
        max_tokens,
        SamplingRules(seed=0, stop_token_ids=stops),
        include_stop_token=include_stop_token,
        speculation=SpeculationOptions(trace=True),
    )
    one = Decoding(request, 0, 0.0, 8)
    one.commit(2, Draft(), VerifyResult(None))
    return one


def result(num_accepted: int, next_token: int, *logprobs: TokenLogprobs) -> VerifyResult:
    return VerifyResult(Verification(num_accepted, next_token, logprobs))


def test_accepted_tokens_and_the_extra_one_are_committed_and_all_but_the_last_are_cached() -> None:
    one = decoding()
    delta = one.commit(1, Draft((4, 5, 6), "free"), result(2, 7))
    assert delta is not None
    assert delta.tokens == (4, 5, 7)
    assert delta.finish_reason is None
    assert one.tokens.tolist() == [1, 2, 3, 4, 5, 7]
    assert one.cached_tokens.tolist() == [1, 2, 3, 4, 5]
    assert one.num_pending == 1


@pytest.mark.parametrize("include", [False, True])
def test_the_first_stop_token_ends_the_request_wherever_it_stands_in_the_draft(include: bool) -> None:
    one = decoding(include_stop_token=include)
    delta = one.commit(1, Draft((4, STOP, STOP, 6), "free"), result(4, 7))
    assert delta is not None
    assert delta.tokens == ((4, STOP) if include else (4,))
    assert (delta.finish_reason, delta.stop_token) == ("stop", STOP)
    assert one.cached_tokens.tolist() == [1, 2, 3, 4, STOP]
    assert delta.trace is not None
    assert delta.stats is not None
    counts = (delta.trace.num_accepted, delta.stats.num_accepted_draft_tokens, one.num_accepted_kept)
    assert counts == (len(delta.tokens),) * 3
    assert delta.stats.acceptance_histogram[len(delta.tokens)] == delta.stats.num_spec_steps == 1


def test_without_stop_tokens_nothing_stops() -> None:
    delta = decoding(stops=()).commit(1, Draft((4, STOP), "free"), result(2, STOP))
    assert delta is not None
    assert delta.tokens == (4, STOP, STOP)
    assert delta.finish_reason is None


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 3, 4])
def test_the_output_ends_at_max_tokens_exactly(max_tokens: int) -> None:
    delta = decoding(max_tokens).commit(1, Draft((4, 5, 6), "free"), result(3, 7))
    assert delta is not None
    assert delta.tokens == (4, 5, 6, 7)[:max_tokens]
    assert delta.finish_reason == "length"


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    delta = decoding(2).commit(1, Draft((4,), "free"), result(1, STOP))
    assert delta is not None
    assert (delta.tokens, delta.finish_reason) == ((4,), "stop")


def test_log_probabilities_are_cut_with_their_tokens() -> None:
    each = [TokenLogprobs(token, -1.0, 1, ()) for token in (4, STOP, 6)]
    delta = decoding().commit(1, Draft((4, STOP), "free"), result(2, 6, *each))
    assert delta is not None
    assert [one.token for one in delta.logprobs] == [4]


def test_prompt_log_probabilities_come_with_the_first_token() -> None:
    request = GenerationRequest("r", [1, 2, 3], 4, SamplingRules(seed=0), prompt_logprobs=0)
    one = Decoding(request, 0, 0.0, 8)
    second, third = (TokenLogprobs(token, -1.0, 1, ()) for token in (2, 3))
    assert one.commit(2, Draft(), VerifyResult(None, (second, third))) is None
    first = one.commit(1, Draft(), result(0, 5))
    later = one.commit(1, Draft(), result(0, 6))
    assert first is not None
    assert later is not None
    assert [each.token for each in first.prompt_logprobs] == [2, 3]
    assert later.prompt_logprobs == ()


def test_statistics_count_only_steps_with_drafts_and_are_snapshots() -> None:
    one = decoding(100)
    deltas = [
        one.commit(1, Draft(), result(0, 4)),
        one.commit(1, Draft((4, 5, 6), "free"), result(1, 4)),
        one.commit(1, Draft((4, 5), "free"), result(2, 4)),
    ]
    stats = [delta.stats for delta in deltas if delta is not None]
    assert [each.num_spec_steps for each in stats if each] == [0, 1, 2]
    last = stats[-1]
    assert last is not None
    assert (last.num_draft_tokens, last.num_accepted_draft_tokens, last.num_spec_tokens) == (5, 3, 8)
    assert last.acceptance_histogram == [0, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SpeculationOptions(), 8),
        (SpeculationOptions(max_draft_tokens=3), 3),
        (SpeculationOptions(max_draft_tokens=99), 8),
        (SpeculationOptions(max_draft_tokens=0), 0),
        (SpeculationOptions(enabled=False), 0),
    ],
)
def test_a_request_may_ask_for_shorter_drafts_than_the_service_has(options: SpeculationOptions, expected: int) -> None:
    request = GenerationRequest("r", [1], 4, SamplingRules(seed=0), speculation=options)
    one = Decoding(request, 0, 0.0, 8)
    assert one.max_draft_tokens == expected
    assert len(one.stats.acceptance_histogram) == expected + 1
