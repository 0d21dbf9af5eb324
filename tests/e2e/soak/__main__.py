"""`make soak`: send mixed traffic for minutes, with faults near the end, then check everything and write a report.

Fails if an output differs from plain decoding's, a client saw a wrong answer, a counter does not add up, memory or open
files grew, or the server did not exit with status 0.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import ROOT
from tests.e2e.soak.bodies import pool
from tests.e2e.soak.checks import references, unreconciled, wrong_outputs
from tests.e2e.soak.clients import Traffic
from tests.e2e.soak.server import Server, server

WARM_SHARE, FAULTS_FROM, FAULTS_TO = 0.25, 0.7, 0.93  # shares of the run time
FAULT_INTERVAL_SECONDS = 8.0
MAX_GROWTH = 1.05  # of memory, from the end of the warm-up to the end
SLACK_MEBIBYTES = 16
SLACK_FILES = 4
MAX_SHOWN = 12
SETTLE_SECONDS = 25  # for clients that never read to be cut off, and for audits to run
SETTINGS = {
    "DIFFUSPEC_SCHEDULER__MAX_RUNNING": "8",
    "DIFFUSPEC_SCHEDULER__MAX_WAITING": "64",
    "DIFFUSPEC_MODEL__CONTEXT_LENGTH": "1024",
    "DIFFUSPEC_SERVER__UNREAD_SECONDS": "4",
    "DIFFUSPEC_AUDIT__FRACTION": "0.05",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=10, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--bodies", type=int, default=60, help="distinct requests (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options, Path(folder))
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "memory"}, indent=2))
    print(f"\nThe report: {options.report}")
    return 1 if report["violations"] else 0


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bodies = pool(options.bodies, options.seed)
    if options.engine == "vllm":  # its draws depend on the drafts, and it refuses `min_p` with drafts
        bodies = [body for body in bodies if body.is_greedy]
    module = "tests.e2e.soak.serve" if options.engine == "embedded" else "service.cli"
    command = ("serve",) if options.engine == "vllm" else ()
    arguments = (*command, "--threads", "1", "--engine", options.engine)
    with server(module, folder / "log", *arguments, **SETTINGS) as running:
        traffic = Traffic(running.url, bodies, options.seed)
        try:
            report = run(options, running, traffic)
        finally:
            traffic.finish()
        violations = [*traffic.complaints, *_memory_grown(report)]
        try:
            violations += _reconcile(report, running, traffic, options.engine == "embedded")
        except httpx.TransportError as error:
            violations.append(f"the server no longer answers for its metrics: {error!r}")
        try:
            status = running.stop()
            if status != 0:
                violations.append(f"the server ended with status {status}")
        except subprocess.TimeoutExpired:
            violations.append("the server did not end on SIGTERM")
        report["tracebacks in the log"] = running.log.read_text(errors="replace").count("Traceback (most recent")
    plain = ("serve", "--threads", "1", "--engine", options.engine)
    plain += ("--method", "none") if options.engine == "vllm" else ("--drafter", "none")
    with server("service.cli", folder / "plain", *plain, DIFFUSPEC_MODEL__CONTEXT_LENGTH="1024") as reference:
        violations += wrong_outputs(traffic.seen, bodies, references(reference.url, bodies))
    report["compared outputs"] = sum(one.answer is not None for one in traffic.seen)
    report["violations"] = len(violations)
    report["first violations"] = violations[:MAX_SHOWN]
    return report


def run(options: argparse.Namespace, running: Server, traffic: Traffic) -> dict[str, Any]:
    """Run the traffic for as long as the server lives. Returns what was seen from outside."""
    noise = random.Random(options.seed)
    begin, total = time.monotonic(), 60 * options.minutes
    memory: list[tuple[float, float]] = [(0.0, running.resident_mebibytes)]
    files = running.num_files
    faults: Counter[str] = Counter()
    next_fault = FAULTS_FROM * total
    traffic.start(options.clients)
    while (now := time.monotonic() - begin) < total and not running.has_ended:
        memory.append((round(now, 1), running.resident_mebibytes))
        if now >= next_fault and now < FAULTS_TO * total:
            next_fault = now + FAULT_INTERVAL_SECONDS
            faults[_plant(running, options.engine, noise)] += 1
        time.sleep(1.0)
    traffic.finish()
    if running.has_ended:
        traffic.complaints.insert(0, f"the server ended by itself with status {running.process.returncode}")
    else:
        time.sleep(SETTLE_SECONDS)
    statuses = Counter("left" if one.status is None else str(one.status) for one in traffic.seen)
    sizes = [size for _, size in memory]
    return {
        "minutes": options.minutes,
        "engine": options.engine,
        "seed": options.seed,
        "requests": len(traffic.seen),
        "manners": dict(traffic.manners),
        "statuses": dict(statuses),
        "faults": dict(faults),
        "mebibytes": {
            "start": round(sizes[0], 1),
            "warm": round(next((size for at, size in memory if at >= WARM_SHARE * total), sizes[-1]), 1),
            "max": round(max(sizes), 1),
            "end": round(sizes[-1] if running.has_ended else running.resident_mebibytes, 1),
        },
        "files": {"start": files, "end": files if running.has_ended else running.num_files},
        "memory": memory,
    }


def _reconcile(report: dict[str, Any], running: Server, traffic: Traffic, counts_by_service: bool) -> Iterator[str]:
    """Add the server's counters to the report, and yield what doesn't add up."""
    report["generated tokens"] = running.metric("vllm:generation_tokens_total")
    yield from unreconciled(traffic.seen, running, counts_by_service)
    report["audits"] = {
        "run": running.metric("diffuspec_audits_run_total"),
        "failed": running.metric("diffuspec_audits_failed_total"),
    }
    report["drafter failures"] = running.metric("diffuspec_drafter_failures_total")
    if report["audits"]["failed"]:
        yield f"{report['audits']['failed']:g} audits failed"


def _plant(running: Server, engine: str, noise: random.Random) -> str:
    """Plant one fault, and return its kind."""
    if engine == "embedded" and noise.random() < 0.6:
        running.process.send_signal(signal.SIGUSR1)
        return "drafter"
    running.process.send_signal(signal.SIGSTOP)
    time.sleep(noise.uniform(0.5, 2.0))
    running.process.send_signal(signal.SIGCONT)
    return "stopped"


def _memory_grown(report: dict[str, Any]) -> list[str]:
    sizes, files = report["mebibytes"], report["files"]
    grown = []
    if sizes["end"] > MAX_GROWTH * sizes["warm"] + SLACK_MEBIBYTES:
        grown.append(f"memory grew from {sizes['warm']} to {sizes['end']} MiB")
    if files["end"] > files["start"] + SLACK_FILES:
        grown.append(f"open files grew from {files['start']} to {files['end']}")
    return grown


if __name__ == "__main__":
    sys.exit(main())
