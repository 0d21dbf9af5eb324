"""Metrics agree with the step records."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from drafters.base import Draft, DraftingCost, Outcome, SearchFacts, StepRecord
from service.engine.base import EnginePhase
from service.metrics import ServiceMetrics
from tests.integration.scripted_engine import ScriptedEngine

DRAFTED = Draft(tokens=(1, 2, 3), source="diffusion", survival=(0.75, 0.5, 0.25), search=SearchFacts(3, 4.0, 0.3))
STEP = StepRecord(
    outcomes=(
        Outcome("a", DRAFTED, 2),
        Outcome("b", Draft(tokens=(5,), source="free", survival=(0.5,)), 0),
        Outcome("c", Draft(bypass_reason="not_worth_it"), 0),
        Outcome("d", Draft(bypass_reason="a reason nobody foresaw"), 0),
    ),
    num_rows=20,
    num_prefill_rows=12,
    drafting=DraftingCost(draft_seconds=0.01, search_seconds=0.001, num_diffusion_rows=9),
    verify_seconds=0.02,
    commit_seconds=0.0005,
)


@pytest.fixture
def metrics() -> ServiceMetrics:
    return ServiceMetrics(CollectorRegistry(), "tiny", max_draft_tokens=4)


def value(metrics: ServiceMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "tiny", **labels})


def test_a_step_is_counted_by_vllms_names(metrics: ServiceMetrics) -> None:
    metrics.observe(STEP)
    metrics.observe(STEP)
    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 4
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 8
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 4
    by_position = [
        value(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(4)
    ]
    assert by_position == [2, 2, 0, 0]
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position="4") is None


def test_a_step_is_counted_by_our_names(metrics: ServiceMetrics) -> None:
    metrics.observe(STEP)
    assert value(metrics, "diffuspec_expected_committed_tokens_total") == 4.0
    assert value(metrics, "diffuspec_realised_committed_tokens_total") == 4
    assert value(metrics, "diffuspec_rows_total", kind="prefill") == 12
    assert value(metrics, "diffuspec_rows_total", kind="decode") == 8
    assert value(metrics, "diffuspec_rows_total", kind="diffusion") == 9
    assert value(metrics, "diffuspec_step_seconds_sum", phase="verify") == 0.02
    assert value(metrics, "diffuspec_draft_length_sum", source="diffusion", policy="goodput") == 3
    assert value(metrics, "diffuspec_draft_length_count", source="none", policy="goodput") == 2
    drafted = [value(metrics, "diffuspec_draft_tokens_per_pos_total", position=str(i)) for i in range(4)]
    assert drafted == [2, 1, 1, 0]
    assert value(metrics, "diffuspec_lattice_width_sum") == 4.0
    assert value(metrics, "diffuspec_path_gain_nats_sum") == 0.3
    assert value(metrics, "diffuspec_speculation_bypassed_total", reason="not_worth_it") == 1
    assert value(metrics, "diffuspec_speculation_bypassed_total", reason="other") == 1
    assert value(metrics, "diffuspec_policy_info", policy="goodput") == 1


def test_failures_of_the_drafter_are_counted(metrics: ServiceMetrics) -> None:
    metrics.observe(StepRecord((), 1, 0, num_drafter_failures=2))
    metrics.observe(StepRecord((), 1, 0))
    assert value(metrics, "diffuspec_drafter_failures_total") == 2


def test_draft_lengths_are_kept_apart_by_the_policy_that_chose_them(metrics: ServiceMetrics) -> None:
    drafts = (Outcome("a", DRAFTED, 0, "paper"), Outcome("b", DRAFTED, 0, "fixed"), Outcome("c", DRAFTED, 0))
    metrics.observe(StepRecord(drafts, 12, 0))
    for policy in ("paper", "fixed", "goodput"):  # goodput is the service's default
        assert value(metrics, "diffuspec_draft_length_count", source="diffusion", policy=policy) == 1


def test_steps_without_prompt_tokens_are_timed_apart_by_batch_and_drafting(metrics: ServiceMetrics) -> None:
    seconds = DraftingCost(draft_seconds=0.01, search_seconds=0.01), 0.02, 0.01
    metrics.observe(StepRecord(STEP.outcomes[:2], 6, 0, *seconds))
    metrics.observe(StepRecord(STEP.outcomes[2:3], 1, 0, *seconds))
    metrics.observe(StepRecord(STEP.outcomes, 16, 12, *seconds))  # also reads a prompt, so it does not count
    metrics.observe(StepRecord((), 12, 0, *seconds))
    metrics.observe(StepRecord(STEP.outcomes[2:] * 20, 40, 0, *seconds))
    assert value(metrics, "diffuspec_decode_steps_total", drafted="yes", batch="2") == 1
    assert value(metrics, "diffuspec_decode_step_seconds_total", drafted="yes", batch="2") == pytest.approx(0.05)
    assert value(metrics, "diffuspec_decode_step_tokens_total", drafted="yes", batch="2") == 4
    assert value(metrics, "diffuspec_decode_step_tokens_total", drafted="no", batch="1") == 1
    assert value(metrics, "diffuspec_decode_step_seconds_total", drafted="no", batch="1") == pytest.approx(0.03)
    assert value(metrics, "diffuspec_decode_step_seconds_total", drafted="yes", batch="1") == pytest.approx(0.02)
    assert value(metrics, "diffuspec_decode_step_tokens_total", drafted="no", batch="33+") == 40
    assert value(metrics, "diffuspec_decode_steps_total", drafted="yes", batch="3-4") == 0


def test_the_engines_phase_is_asked_for(metrics: ServiceMetrics) -> None:
    phases: list[EnginePhase] = ["loading"]
    metrics.watch_phase(lambda: phases[-1])
    assert value(metrics, "diffuspec_engine_phase", phase="loading") == 1
    phases.append("hung")
    assert value(metrics, "diffuspec_engine_phase", phase="loading") == 0
    assert value(metrics, "diffuspec_engine_phase", phase="hung") == 1


def test_tokens_of_one_step_share_its_time(metrics: ServiceMetrics) -> None:
    metrics.observe_prompt(7, 0.5)
    metrics.observe_first_token(0.75)
    metrics.observe_tokens(1, None)
    metrics.observe_tokens(4, 0.02)
    metrics.observe_end("length", 1.0)
    assert value(metrics, "vllm:prompt_tokens_total") == 7
    assert value(metrics, "vllm:generation_tokens_total") == 5
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") == 0.75
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == 0.5
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 4
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.02)
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1


def test_nothing_a_client_sends_becomes_a_label(metrics: ServiceMetrics) -> None:
    before = len(generate_latest(metrics.registry).splitlines())
    for i in range(50):
        record = StepRecord((Outcome(f"id-{i}", Draft(bypass_reason=f"r{i}"), 0),), 1, 0)
        metrics.observe(record)
    assert len(generate_latest(metrics.registry).splitlines()) == before


def test_the_drafters_state_is_asked_for(metrics: ServiceMetrics) -> None:
    engine = ScriptedEngine(lambda _: [])
    metrics.watch(engine)
    assert value(metrics, "diffuspec_drafter_up") == 1
    engine.drafter_up = False
    assert value(metrics, "diffuspec_drafter_up") == 0


def test_what_a_stop_token_cut_off_is_not_called_accepted(metrics: ServiceMetrics) -> None:
    metrics.observe(StepRecord((Outcome("a", DRAFTED, 3, num_cut=2),), 4, 0))
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 1
    by_position = [
        value(metrics, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(3)
    ]
    assert by_position == [1, 0, 0]
