"""Step costs: the report is complete, and projections are correct."""

import json
from pathlib import Path

import pytest

from benchmarks.shapes import KINDS, SIZES, drafter_config
from benchmarks.step_costs import main, project


def test_every_phase_of_a_step_is_measured_and_every_pair_projected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "costs.json"
    options = ["--contexts", "32,64", "--drafted", "4", "--length", "6", "--repeats", "1", "--json", str(report)]
    main(["--drafters", "tiny-dream,tiny-sdar", *options])
    found = json.loads(report.read_text())
    assert set(found) == {"target tiny", "tiny-dream", "tiny-sdar", "search"}
    assert {(timing["context"], timing["rows"]) for timing in found["target tiny"]} == {
        (context, rows) for context in (32, 64) for rows in (1, 5, 7)
    }
    assert all(timing["milliseconds"] > 0 for timings in found.values() for timing in timings)
    printed = capsys.readouterr().out
    assert "break-even" in printed
    assert "tiny-sdar" in printed


def test_a_speed_up_is_tokens_per_step_over_relative_cost() -> None:
    assert project(plain=10, verify=12, draft=6, search=2, lengths=[2, 4]) == [1.0, 2.0]


def test_every_shape_is_a_valid_configuration() -> None:
    for size in SIZES:
        for kind in KINDS:
            config = drafter_config(f"{size}-{kind}")
            config.check(Path("config.json"))
