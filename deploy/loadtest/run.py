"""`make loadtest`: run locust headless against a local server, and write reports/loadtest.html.

A server that answers at --url is used as it is. Otherwise `diffuspec serve` is started there for the duration of the
test. Everything after `--` goes to locust, e.g. `-- --arrivals open --rate 2`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "loadtest.html")
    parser.add_argument("locust", nargs="*", help="more arguments for locust, after --")
    options = parser.parse_args(argv)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("locustfile.py")), "--headless"]
    command += ["--host", options.url, "--users", str(options.users), "--spawn-rate", str(options.users)]
    command += ["--run-time", f"{options.seconds}s", "--stop-timeout", "30", "--html", str(options.report)]
    command += ["--csv", str(options.report.with_suffix("")), "--only-summary", *options.locust]
    with server(options.url):
        status = subprocess.run(command, check=False).returncode
    print(f"\nThe report: {options.report}")
    return status


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def server(url: str) -> Iterator[None]:
    """Use the server that answers at `url`, or start one there."""
    if is_ready(url):
        yield
        return
    address = urlsplit(url)
    command = [sys.executable, "-m", "service.cli", "serve", "--host", address.hostname or "127.0.0.1"]
    command += ["--port", str(address.port or 8000), "--threads", "1"]  # the bundled pair is too small for more threads
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start; try `make serve` to see why")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
