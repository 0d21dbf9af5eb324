"""Placement of requests, and what they reuse. The copies are real ones, between rows of token ids."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from drafters.base import Draft, num_common
from service.engine.base import GenerationRequest
from service.engine.prefix_cache import MIN_COPY, PrefixCache
from service.engine.sequence import Decoding
from verifiers.base import SamplingRules, VerifyResult


class Slots:
    """A cache whose keys and values are the token ids themselves, so that what is reused can be checked."""

    def __init__(self, num_slots: int, length: int = 200, reuses: bool = True) -> None:
        self.entries: NDArray[np.int32] = np.full((num_slots, length), -1, dtype=np.int32)
        self.num_copies = 0
        self.cache = PrefixCache(num_slots, self.copy_slot, reuses)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self.entries[target, :length] = self.entries[source, :length]
        self.num_copies += 1

    def place(
        self, prompt: list[int], max_tokens: int = 4, prompt_logprobs: int | None = None, tenant: str = ""
    ) -> Decoding:
        request = GenerationRequest(
            "r", prompt, max_tokens, SamplingRules(seed=0), prompt_logprobs=prompt_logprobs, tenant=tenant
        )
        one = Decoding(request, 0, 0.0, 0)
        if self.cache.place(one):
            assert self.entries[one.slot, : one.num_cached].tolist() == prompt[: one.num_cached]
            assert one.num_cached < len(prompt)
        return one

    def read(self, one: Decoding, num_tokens: int | None = None) -> None:
        """Run `num_tokens` prompt tokens 'through the model'; None: all but the last."""
        count = one.num_pending - 1 if num_tokens is None else num_tokens
        at = one.num_cached
        self.entries[one.slot, at : at + count] = one.tokens[at : at + count]
        one.commit(count, Draft(), VerifyResult(None))


def prompt(seed: int, length: int = 40) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 1000, size=length)]


def test_a_finished_request_is_reused_in_place() -> None:
    slots = Slots(4)
    first = slots.place(prompt(1))
    slots.read(first)
    slots.cache.vacate(first)
    again = slots.place([*prompt(1), 7, 8])
    assert again.num_reused == 39  # the first request read this many
    assert slots.num_copies == 0


def test_a_running_request_is_copied() -> None:
    slots = Slots(4)
    first = slots.place(prompt(1))
    slots.read(first)
    second = slots.place([*prompt(1)[:30], 7, 8])
    assert second.num_reused == 30
    assert second.slot != first.slot
    assert slots.num_copies == 1


def test_a_prompt_that_is_known_in_full_still_has_its_last_token_to_run() -> None:
    slots = Slots(2)
    first = slots.place([*prompt(1), 5])
    slots.read(first)
    slots.cache.vacate(first)
    assert slots.place(prompt(1)).num_pending == 1


def test_nothing_is_reused_for_log_probabilities_of_the_prompt_or_from_a_failed_request() -> None:
    slots = Slots(1)
    first = slots.place(prompt(1))
    slots.read(first)
    slots.cache.vacate(first)
    second = slots.place(prompt(1), prompt_logprobs=0)
    assert second.num_reused == 0
    slots.read(second)
    slots.cache.vacate(second, is_intact=False)
    assert slots.place(prompt(1)).num_reused == 0


def test_reuse_can_be_off() -> None:
    slots = Slots(2, reuses=False)
    first = slots.place(prompt(1))
    slots.read(first)
    assert slots.place(prompt(1)).num_reused == 0  # nor does it wait for its twin


def test_few_shared_tokens_are_not_worth_a_copy() -> None:
    slots = Slots(4)
    first = slots.place(prompt(1))
    slots.read(first)
    assert slots.place([*prompt(1)[: MIN_COPY - 1], 7, 8]).num_reused == 0


def test_a_twin_waits_until_its_prompt_has_been_read_once() -> None:
    slots = Slots(4)
    first = slots.place(prompt(1))
    slots.read(first, 5)
    assert slots.place(prompt(1)).slot == -1  # waits, because 39 tokens will be cached soon
    assert slots.place(prompt(2)).slot >= 0  # strangers don't wait
    slots.read(first, 30)
    assert slots.place(prompt(1)).num_reused == 35


def test_finished_requests_outlive_each_other_until_their_slots_are_needed() -> None:
    slots = Slots(3)
    for seed in (1, 2, 3):
        one = slots.place(prompt(seed))
        slots.read(one)
        slots.cache.vacate(one)
    assert slots.place(prompt(4)).slot == 0  # the least recently used slot, which held prompt 1
    again = slots.place(prompt(3))
    assert again.num_reused == 39
    assert slots.place(prompt(1)).num_reused == 0


def test_running_requests_stay_in_neighbouring_slots() -> None:
    slots = Slots(8)
    running = [slots.place(prompt(seed)) for seed in range(5)]
    taken = sorted(one.slot for one in running)
    assert taken[-1] - taken[0] == 4
    for one in (running[1], running[3]):
        slots.cache.vacate(one)
    holes = {slots.place(prompt(seed)).slot for seed in (10, 11)}
    assert holes <= set(range(taken[0], taken[-1] + 1))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(17, 60), st.booleans()), max_size=40), st.integers(1, 5))
def test_whatever_comes_and_goes_what_is_reused_is_what_the_prompt_needs(
    events: list[tuple[int, int, bool]], num_slots: int
) -> None:
    slots = Slots(num_slots)  # `place` checks every reuse token by token
    running: list[Decoding] = []
    for family, length, leaves in events:
        one = slots.place([*prompt(family, length), *prompt(length, 5)])
        if one.slot >= 0:
            slots.read(one)
            running.append(one)
        if leaves and running:
            slots.cache.vacate(running.pop(0))
    assert slots.cache.num_free == num_slots - len(running)


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_common_prefix_is_the_longest(left: list[int], right: list[int]) -> None:
    size = num_common(np.array(left, dtype=np.int32), np.array(right, dtype=np.int32))
    assert left[:size] == right[:size]
    assert size in (len(left), len(right)) or left[size] != right[size]


def test_tenants_find_nothing_of_each_other() -> None:
    slots = Slots(4)
    first = slots.place(prompt(1), tenant="a")
    slots.read(first)
    beside = slots.place(prompt(1), tenant="b")  # while the other runs
    assert beside.num_reused == 0
    slots.cache.vacate(beside)
    slots.cache.vacate(first)
    assert slots.place(prompt(1), tenant="c").num_reused == 0
    again = slots.place(prompt(1), tenant="a")
    assert again.num_reused > 0
