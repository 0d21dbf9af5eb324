"""The capacity plan agrees with queueing theory where a formula exists, and reads a replica's metrics."""

from pathlib import Path
from random import Random
from statistics import fmean

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from drafters.base import Draft, Outcome, StepRecord
from service.metrics import ServiceMetrics
from tests.unit.deploy.scripts import load

plan = load("capacity/plan")

ALONE = plan.StepCosts([(1.0, 0.01, 1.0)], 0.0)
BATCHED = plan.StepCosts([(1.0, 0.010, 2.0), (3.0, 0.014, 6.0), (9.0, 0.020, 9.0)], 0.001)


def test_one_at_a_time_waits_as_the_pollaczek_khinchine_formula_says() -> None:
    """M/D/1 with requests of 10 steps of 10 ms: the mean wait is rho * S / (2 * (1 - rho))."""
    workload = plan.Workload(0, 10, 10, max_running=1)
    for load_factor in (0.3, 0.7):
        found = plan.simulate(ALONE, workload, load_factor / 0.1, Random(1), 8000)
        expected = 0.1 + load_factor * 0.1 / (2 * (1 - load_factor))
        assert fmean(found.total) == pytest.approx(expected, rel=0.1)
        assert found.busy == pytest.approx(load_factor, rel=0.05)


def test_a_lonely_request_takes_its_prompt_and_its_steps() -> None:
    workload = plan.Workload(100, 20, 20)
    found = plan.simulate(BATCHED, workload, 0.001, Random(2), 50)
    assert found.total == pytest.approx([0.1 + 10 * 0.010] * 45)
    assert found.first_token == pytest.approx([0.1 + 0.010] * 45)
    assert found.mean_batch == pytest.approx(1.0)


def test_costs_are_interpolated_and_grow_in_proportion_beyond_what_was_measured() -> None:
    assert BATCHED.at(2) == pytest.approx((0.012, 4.0))
    assert BATCHED.at(9) == pytest.approx((0.020, 9.0))
    assert BATCHED.at(18) == pytest.approx((0.040, 18.0))


def test_beyond_the_highest_rate_the_queue_grows_and_below_it_does_not() -> None:
    workload = plan.Workload(0, 30, 60, max_running=9)
    highest = plan.max_rate(BATCHED, workload)
    early, late = (plan.simulate(BATCHED, workload, factor * highest, Random(3), 1000) for factor in (0.8, 1.3))
    assert late.percentile(late.total, 50) > 10 * early.percentile(early.total, 50)
    assert late.busy > 0.99


def test_it_reads_what_a_replica_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = ServiceMetrics(CollectorRegistry(), "tiny", max_draft_tokens=4)
    drafted = Outcome("a", Draft(tokens=(1, 2), source="free"), 2)
    for _ in range(50):
        metrics.observe(StepRecord([drafted], 3, 0, verify_seconds=0.02))
        metrics.observe(StepRecord([drafted] * 4, 12, 0, verify_seconds=0.04))
    metrics.observe(StepRecord([drafted] * 30, 90, 0, verify_seconds=9.0))  # too rare to count
    metrics.observe(StepRecord([], 100, 100, verify_seconds=0.2))
    text = generate_latest(metrics.registry).decode()
    costs = plan.read_costs(text)
    assert [list(point) for point in costs.points] == [pytest.approx([1, 0.02, 3]), pytest.approx([3.5, 0.04, 12])]
    assert costs.prefill_seconds == pytest.approx(0.002)
    (tmp_path / "metrics").write_text(text)
    arguments = ["--metrics", str(tmp_path / "metrics"), "--output-tokens", "30-30", "--prompt-tokens", "50"]
    assert plan.main([*arguments, "--rate", "20", "--p99-seconds", "1"]) == 0
    assert "replicas keep the 99th percentile under 1 s" in capsys.readouterr().out
    assert plan.main([*arguments, "--rate", "20", "--p99-seconds", "0.1"]) == 1  # one request alone takes 0.3 s
    assert "No number of replicas" in capsys.readouterr().out


def test_an_idle_replica_is_not_believed() -> None:
    metrics = ServiceMetrics(CollectorRegistry(), "tiny")
    with pytest.raises(ValueError, match="load it first"):
        plan.read_costs(generate_latest(metrics.registry).decode())
