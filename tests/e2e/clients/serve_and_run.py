"""Start a server on the bundled pair, run the clients against it with another Python, and end it.

`python serve_and_run.py CLIENTS_PYTHON [CLIENT ...]`; the exit status is the clients'.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

START_SECONDS = 300


def main(python: str, names: list[str]) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "service.cli", "serve", "--port", str(port)])
    try:
        _wait(url, server)
        return subprocess.run([python, str(Path(__file__).with_name("run.py")), url, *names]).returncode
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not become ready")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
