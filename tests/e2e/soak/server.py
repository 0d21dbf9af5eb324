"""The server process of a soak as seen from outside: memory, metrics, log."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import ROOT, wait_until_ready

START_SECONDS = 600  # vLLM starts two processes that import it, and numba may have to compile


@dataclass
class Server:
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def resident_mebibytes(self) -> float:
        """Resident memory; 0 if the process has ended but was not waited for yet."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return (
            int(next((line for line in status.splitlines() if line.startswith("VmRSS")), "VmRSS: 0").split()[1]) / 1024
        )

    @property
    def num_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        text = httpx.get(self.url + "/metrics", timeout=60).text
        families = text_string_to_metric_families(text)
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def metric(self, name: str) -> float:
        return sum(value for found, _, value in self.samples() if found == name)

    def log_lines(self) -> list[dict[str, Any]]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


@contextmanager
def server(module: str, log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """Run `python -m module arguments --port P` on a free port of 127.0.0.1, and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--port", str(port)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DIFFUSPEC_LOGGING__FORMAT": "json", **environment},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, START_SECONDS)
        yield Server(url, process, log)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
