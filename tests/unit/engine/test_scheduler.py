"""Queue, admission and prefill shares, over a real cache of slots. Deciding who runs needs no model."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafters.base import Draft
from service.engine.base import GenerationRequest, QueueFullError, RequestFailedError
from service.engine.prefix_cache import PrefixCache
from service.engine.scheduler import Scheduler, SchedulerLimits, fair_shares
from service.engine.sequence import Decoding
from verifiers.base import SamplingRules, Verification, VerifyResult


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def decoding(arrival: int, num_prompt: int = 10, max_tokens: int = 10, priority: int = 0, tenant: str = "") -> Decoding:
    prompt = [(arrival * 31 + i) % 97 for i in range(num_prompt)]
    rules = SamplingRules(seed=0)
    request = GenerationRequest(f"r{arrival}", prompt, max_tokens, rules, priority=priority, tenant=tenant)
    return Decoding(request, arrival, 0.0, 0)


def scheduler(limits: SchedulerLimits, num_slots: int = 8, clock: Clock | None = None) -> Scheduler:
    slots = PrefixCache(num_slots, lambda source, target, length: None)
    return Scheduler(limits, slots, 100, clock or Clock())


def finish_prompt(one: Decoding) -> None:
    one.commit(one.num_pending, Draft(), VerifyResult(Verification(0, 1)))


@given(st.integers(1, 400), st.lists(st.integers(1, 300), max_size=20))
def test_shares_use_the_whole_budget_and_give_nobody_more_than_a_smaller_want_left(
    total: int, wants: list[int]
) -> None:
    shares = fair_shares(total, wants)
    assert sum(shares) == min(total, sum(wants))
    assert all(share <= want for share, want in zip(shares, wants, strict=True))
    unmet = [share for share, want in zip(shares, wants, strict=True) if share < want]
    if unmet and total >= len(wants) ** 2:  # below that, indivisible units go to the first
        assert max(shares) <= min(unmet) + len(wants)


def test_requests_run_in_order_of_priority_then_arrival() -> None:
    queue = scheduler(SchedulerLimits(max_running=2))
    for arrival, priority in enumerate([5, 0, 5, -1, 0]):
        queue.enqueue(decoding(arrival, priority=priority))
    queue.admit()
    assert [one.arrival for one in queue.running] == [3, 1]
    for one in list(queue.running):
        queue.remove(one)
    queue.admit()
    assert [one.arrival for one in queue.running] == [4, 0]


def test_memory_is_promised_before_admission_and_nobody_overtakes_who_waits_for_it() -> None:
    queue = scheduler(SchedulerLimits(kv_cache_tokens=50))
    for arrival, max_tokens in enumerate([20, 30, 5]):  # need 30, 40 and 15 positions
        queue.enqueue(decoding(arrival, max_tokens=max_tokens))
    queue.admit()
    assert [one.arrival for one in queue.running] == [0]
    assert queue.cache_usage == 30 / 50
    queue.remove(queue.running[0])
    queue.admit()
    assert [one.arrival for one in queue.running] == [1]
    queue.remove(queue.running[0])
    assert queue.cache_usage == 0


def test_a_request_that_could_never_fit_is_refused_at_once() -> None:
    queue = scheduler(SchedulerLimits(kv_cache_tokens=50))
    with pytest.raises(RequestFailedError, match="50 tokens"):
        queue.check_capacity(decoding(0, max_tokens=41), [])


def test_a_full_queue_says_when_to_come_back_from_the_pace_of_admissions() -> None:
    clock = Clock()
    queue = scheduler(SchedulerLimits(max_running=1, max_waiting=4), clock=clock)
    for arrival in range(5):
        queue.check_capacity(decoding(arrival), [])
        queue.enqueue(decoding(arrival))
    with pytest.raises(QueueFullError) as unknown:
        queue.check_capacity(decoding(9), [])
    for arrival in range(5, 9):  # one request leaves every two seconds, and another comes
        queue.admit()
        clock.now += 2.0
        queue.remove(queue.running[0])
        queue.enqueue(decoding(arrival))
    queue.admit()
    with pytest.raises(QueueFullError) as paced:
        queue.check_capacity(decoding(9), [])
    clock.now += 20.0  # nobody has left since, so the pace has slowed
    with pytest.raises(QueueFullError) as stalled:
        queue.check_capacity(decoding(9), [])
    assert unknown.value.retry_after_seconds == 1
    assert paced.value.retry_after_seconds == pytest.approx(4 * 2.0, rel=0.25)
    assert stalled.value.retry_after_seconds > 2 * paced.value.retry_after_seconds


def test_a_refusal_without_a_queue_says_that_none_may_wait() -> None:
    queue = scheduler(SchedulerLimits(max_running=1, max_waiting=0))
    queue.enqueue(decoding(0))
    queue.admit()
    with pytest.raises(QueueFullError, match="1 requests are running already, and none may wait"):
        queue.check_capacity(decoding(1), [])


def test_a_quiet_hour_says_nothing_about_the_pace() -> None:
    clock = Clock()
    queue = scheduler(SchedulerLimits(max_running=1, max_waiting=4), clock=clock)
    for arrival in range(8):
        queue.enqueue(decoding(arrival))
        queue.admit()
        clock.now += 1.0
        queue.remove(queue.running[0])
    clock.now += 3600.0
    for arrival in range(10, 15):
        queue.enqueue(decoding(arrival))
    queue.admit()
    with pytest.raises(QueueFullError) as burst:
        queue.check_capacity(decoding(20), [])
    assert burst.value.retry_after_seconds == 1


def test_requests_on_their_way_count_and_free_places_do_not() -> None:
    queue = scheduler(SchedulerLimits(max_running=2, max_waiting=1))
    queue.check_capacity(decoding(0), [decoding(8)] * 2)
    with pytest.raises(QueueFullError):
        queue.check_capacity(decoding(0), [decoding(8)] * 3)


def test_a_step_has_a_token_of_everyone_who_decodes_and_bounded_chunks_of_prompts() -> None:
    queue = scheduler(SchedulerLimits(prefill_chunk_tokens=16))
    for arrival, num_prompt in enumerate([5, 30, 40, 3]):
        queue.enqueue(decoding(arrival, num_prompt=num_prompt))
    queue.admit()
    finish_prompt(queue.running[0])
    scheduled = {one.decoding.arrival: one.num_new for one in queue.schedule()}
    assert scheduled == {0: 1, 1: 7, 2: 6, 3: 3}
    assert [one.decoding.slot for one in queue.schedule()] == sorted(one.decoding.slot for one in queue.schedule())


def test_prompts_are_all_read_even_one_token_at_a_time() -> None:
    queue = scheduler(SchedulerLimits(prefill_chunk_tokens=1))
    for arrival in range(3):
        queue.enqueue(decoding(arrival, num_prompt=4))
    queue.admit()
    for _ in range(12):
        reading = [one for one in queue.schedule() if one.decoding.is_reading]
        assert [one.num_new for one in reading] == [1]
        done = reading[0].decoding.num_pending == 1
        verification = Verification(0, 1) if done else None
        reading[0].decoding.commit(1, Draft(), VerifyResult(verification))
    assert not any(one.is_reading for one in queue.running)


def test_limits_that_cannot_work_are_refused() -> None:
    for number in (0, -1):
        with pytest.raises(ValueError, match="max_running"):
            SchedulerLimits(max_running=number)
        with pytest.raises(ValueError, match="prefill_chunk_tokens"):
            SchedulerLimits(prefill_chunk_tokens=number)
    with pytest.raises(ValueError, match="max_waiting"):
        SchedulerLimits(max_waiting=-1)


def test_tenants_take_turns_however_many_requests_one_has_sent_before() -> None:
    queue = scheduler(SchedulerLimits(max_running=4))
    for arrival, tenant in enumerate(["many"] * 6 + ["few"] * 2):
        queue.enqueue(decoding(arrival, tenant=tenant))
    queue.admit()
    assert [one.arrival for one in queue.running] == [0, 6, 1, 7]
    for one in list(queue.running):
        queue.remove(one)
    queue.admit()
    assert [one.arrival for one in queue.running] == [2, 3, 4, 5]


def test_priority_goes_before_turns() -> None:
    queue = scheduler(SchedulerLimits(max_running=2))
    for arrival, (tenant, priority) in enumerate([("a", 0), ("b", 1), ("a", 0)]):
        queue.enqueue(decoding(arrival, tenant=tenant, priority=priority))
    queue.admit()
    assert [one.arrival for one in queue.running] == [0, 2]


def test_a_tenant_leaves_half_of_the_queue_to_others() -> None:
    queue = scheduler(SchedulerLimits(max_running=1, max_waiting=5))
    queue.enqueue(decoding(0))
    queue.admit()
    for arrival in (1, 2):
        queue.check_capacity(decoding(arrival, tenant="many"), [])
        queue.enqueue(decoding(arrival, tenant="many"))
    with pytest.raises(QueueFullError, match="of this key"):
        queue.check_capacity(decoding(3, tenant="many"), [])
    queue.check_capacity(decoding(3, tenant="few"), [])


def test_the_queue_is_bounded_in_tokens_and_one_request_always_fits() -> None:
    queue = scheduler(SchedulerLimits(max_running=1, max_waiting_tokens=30))
    queue.enqueue(decoding(0))
    queue.admit()
    queue.check_capacity(decoding(1, max_tokens=60), [])
    queue.enqueue(decoding(1))
    queue.check_capacity(decoding(2), [])
    with pytest.raises(QueueFullError, match="of 40 tokens"):
        queue.check_capacity(decoding(3), [decoding(2)])
