"""Run a real Prometheus with the repository's configuration, scraping a test's server."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.conftest import ROOT

DEPLOY = ROOT / "deploy" / "prometheus"
START_SECONDS = 60


def missing_binary() -> str:
    """Return which of Prometheus' programs are not installed; empty if both are."""
    return " and ".join(name for name in ("prometheus", "promtool") if shutil.which(name) is None)


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """Return the `data` of one API call."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        content = answer.json()
        assert content["status"] == "success", (parameters, content)
        return content["data"]

    def samples(self, query: str) -> list[float]:
        """Return the values of an instant query, one per series."""
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]


@contextmanager
def run_prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Scrape `target` (host:port) every second, with deploy/prometheus except for addresses and intervals."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / pattern) for pattern in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs["diffuspec"]["static_configs"] = [{"targets": [target]}]
    del jobs["diffuspec"]["dns_sd_configs"]
    config["scrape_configs"] = [jobs["diffuspec"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_ready(f"http://{address}", process, folder / "log")
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"Prometheus was not ready within {START_SECONDS} s:\n{log.read_text()}")
