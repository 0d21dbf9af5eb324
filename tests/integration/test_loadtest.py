"""Locust, really run against a server over tiny models: every workload, both kinds of arrivals."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.api_server import embedded_app, serving

# Looked for, never imported: locust patches sockets and threads of the process that imports it.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs locust: pip install -e .[loadtest]"
)

LOADTEST = Path(__file__).parents[2] / "deploy" / "loadtest"
WORKLOADS = {"completion", "sampled", "cancelled"}  # what the tiny target can: no chat template, a short context
MIX = ["--mix", "completion=2,sampled=1,cancelled=1"]


def run_locust(url: str, folder: Path, *arguments: str) -> list[dict[str, str]]:
    """The rows of locust's statistics."""
    command = [sys.executable, "-m", "locust", "-f", str(LOADTEST / "locustfile.py"), "--headless", "--host", url]
    command += ["--run-time", "8s", "--stop-timeout", "20", "--only-summary", "--csv", str(folder / "load")]
    command += ["--html", str(folder / "load.html"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "Traceback" not in done.stderr, done.stderr
    assert (folder / "load.html").stat().st_size > 1000
    with (folder / "load_stats.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arrivals", ["closed", "open"])
def test_users_stream_and_are_timed(tiny_target: Path, tiny_drafter: Path, tmp_path: Path, arrivals: str) -> None:
    with serving(embedded_app(tiny_target, tiny_drafter)) as url:
        users = ["--users", "3", "--spawn-rate", "3", "--arrivals", arrivals, "--rate", "2", "--max-tokens", "64", *MIX]
        rows = run_locust(url, tmp_path, *users, "--shape", "ramp")
    names = {row["Name"] for row in rows if row["Type"] == "total" and int(row["Request Count"])}
    assert names  # which of them came in eight seconds is chance; all are drawn, as the unit tests show
    for kind in ("total", "TTFT", "ITL"):
        counted = [row for row in rows if row["Type"] == kind and row["Name"] in WORKLOADS]
        assert sum(int(row["Request Count"]) for row in counted) > 0
        assert sum(int(row["Failure Count"]) for row in counted) == 0
        assert all(float(row["Average Response Time"]) >= 0 for row in counted)


def test_an_open_loop_sees_overload_that_a_closed_loop_hides(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path
) -> None:
    """A server that takes one sequence at a time and lets one wait: arrivals do not slow down, so some are refused."""
    limits = {"scheduler.max_running": 1, "scheduler.max_waiting": 1}
    failures = {}
    for arrivals in ("closed", "open"):
        folder = tmp_path / arrivals
        folder.mkdir()
        with serving(embedded_app(tiny_target, tiny_drafter, **limits)) as url:
            users = [
                "--users",
                "1",
                "--spawn-rate",
                "1",
                "--arrivals",
                arrivals,
                "--rate",
                "200",
                "--max-tokens",
                "48",
                *MIX,
            ]
            rows = run_locust(url, folder, *users)
        counted = [row for row in rows if row["Type"] == "total" and row["Name"] in WORKLOADS]
        failures[arrivals] = sum(int(row["Failure Count"]) for row in counted)
    assert failures["closed"] == 0
    assert failures["open"] > 0
