"""Fixtures that build and start the real compose deployment. Not in `make test`: needs Docker with Compose 2.24.

COMPOSE_TEST_ENV_FILE names a file like .env with this machine's own images, package mirror and free ports.
COMPOSE_TEST_WITHOUT=grafana skips the checks of Grafana, for machines where its image is a stand-in.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS = 3600
COMMAND_SECONDS = 300
KEY = "a-key-of-the-test"


@dataclass(frozen=True)
class Deployment:
    """One compose project. `environment` takes the place of its .env."""

    project: str
    environment: dict[str, str]

    def port(self, name: str, default: int) -> str:
        return self.environment.get(name, str(default))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port('SERVICE_PORT', 8000)}"

    @property
    def prometheus(self) -> str:
        return f"http://127.0.0.1:{self.port('PROMETHEUS_PORT', 9090)}"

    @property
    def grafana(self) -> str:
        return f"http://127.0.0.1:{self.port('GRAFANA_PORT', 3000)}"

    def compose(self, *arguments: str, seconds: float = COMMAND_SECONDS, **environment: str) -> str:
        """Run `docker compose` and return its output. Fails the test if the command fails."""
        command = ["docker", "compose", "--project-name", self.project, *arguments]
        env = {**os.environ, **self.environment, **environment}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def inspect(self, service: str) -> dict[str, Any]:
        """Return `docker inspect` of a service's container, running or not."""
        container = self.compose("ps", "--all", "--quiet", service).strip()
        done = subprocess.run(["docker", "inspect", container], capture_output=True, text=True, check=True, timeout=60)
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Fail unless `condition` holds within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)


def read_variables(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="session")
def without() -> set[str]:
    return set(os.environ.get("COMPOSE_TEST_WITHOUT", "").split(",")) - {""}


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    """The deployment, built and running, with every health check passing."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        pytest.fail("needs a running Docker; `docker info` shows what is missing")
    file = os.environ.get("COMPOSE_TEST_ENV_FILE")
    found = Deployment("diffuspec-test", read_variables(Path(file)) if file else {})
    found.compose("--profile", "loadtest-headless", "build", seconds=BUILD_SECONDS)
    try:
        found.compose("up", "--detach", "--wait", "diffuspec", "prometheus", "grafana", seconds=900)
        found.compose("up", "--detach", "welcome")
        yield found
    finally:
        found.compose("--profile", "*", "down", "--volumes", "--timeout", "60")
