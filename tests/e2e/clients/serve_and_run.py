"""Run third-party clients, unchanged, against servers on the bundled pair: `python serve_and_run.py [NAME ...]`.

Each NAME is a script `try_NAME.py`. It runs in its own environment, `.venv-clients-NAME`, because the clients' pins
conflict with the service's and with each other's; `make test-clients` creates them. A script gets the URL of a server,
and some also get the URL of a second one. Exits with status 1 if a script fails or takes too long, or a server fails.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
START_SECONDS = 300  # numba may have to compile first
END_SECONDS = 60


class ServerError(Exception):
    """A server exited with an error."""


@dataclass(frozen=True)
class Client:
    """The time limit of a script, and its second server, if any."""

    limit_seconds: int
    second_server: Sequence[str] | None = None  # arguments of `diffuspec serve`
    second_settings: dict[str, str] = field(default_factory=dict)  # its environment
    waits_for_second: bool = True  # False: the script needs to see it loading


CLIENTS = {
    "sdks": Client(
        limit_seconds=300,
        second_server=[],
        second_settings={"DIFFUSPEC_SCHEDULER__MAX_RUNNING": "1", "DIFFUSPEC_SCHEDULER__MAX_WAITING": "1"},
        waits_for_second=False,
    ),
    "lm_eval": Client(limit_seconds=600, second_server=["--drafter", "none"]),
    "aiperf": Client(limit_seconds=600),
    "guidellm": Client(limit_seconds=600),
    "schemathesis": Client(
        limit_seconds=1800,
        second_server=[],
        second_settings={"DIFFUSPEC_MODEL__CONTEXT_LENGTH": "128", "DIFFUSPEC_LIMITS__MAX_CHOICES": "2"},
    ),
}


def main(names: Sequence[str]) -> int:
    unknown = sorted(set(names) - set(CLIENTS))
    if unknown:
        print(f"no such client: {', '.join(unknown)}; choose from {', '.join(CLIENTS)}")
        return 2
    failed = []
    try:
        with server([], {}) as url:
            _wait_until_ready(url)
            for name in names or CLIENTS:
                print(f"== {name}", flush=True)
                if not _try(name, CLIENTS[name], url):
                    failed.append(name)
    except ServerError as error:
        failed.append(f"the first server ({error})")
    print(f"failed: {', '.join(failed)}" if failed else "all clients passed", flush=True)
    return 1 if failed else 0


def _try(name: str, client: Client, url: str) -> bool:
    script = [str(ROOT / f".venv-clients-{name}" / "bin" / "python"), str(HERE / f"try_{name}.py")]
    if client.second_server is None:
        return run([*script, url], client.limit_seconds)
    try:
        with server(client.second_server, client.second_settings) as second:
            if client.waits_for_second:
                _wait_until_ready(second)
            return run([*script, url, second], client.limit_seconds)
    except ServerError as error:
        print(f"{name}: the second server: {error}", flush=True)
        return False


def run(command: Sequence[str], limit_seconds: float) -> bool:
    """Run a script and return whether it succeeded in time. Its child processes always end with it."""
    script = subprocess.Popen(command, start_new_session=True)
    try:
        return script.wait(timeout=limit_seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"it did not end within {limit_seconds:g} s", flush=True)
        return False
    finally:
        with suppress(ProcessLookupError):  # its process group is already gone
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()


@contextmanager
def server(arguments: Sequence[str], settings: dict[str, str]) -> Iterator[str]:
    """Start a server on a free port of 127.0.0.1, not ready yet. Raises ServerError if its exit status is not 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DIFFUSPEC_LOGGING__LEVEL": "warning", **settings})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            status = process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    if status:
        raise ServerError(f"it ended with status {status}")


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {START_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
