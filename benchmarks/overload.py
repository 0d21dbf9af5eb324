"""Send ten times as many requests as the server can handle; measure those that it accepts, and its memory.

    python -m benchmarks.overload                      # the bundled pair, embedded engine
    python -m benchmarks.overload --engine vllm        # from .venv-vllm

Starts its own server on 127.0.0.1 and finds its capacity, with as many clients as it can run and queue; each sends its
next request when the last one is answered. Then sends requests at a multiple of that rate without waiting for answers
(an open loop), and compares. Nobody retries. Exits with status 1 if accepted requests take more than `--max-ratio`
times as long as at capacity (medians), if a status other than 200 and 429 comes back, or if an answer is missing.
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from service.bench.environment import describe_environment

START_SECONDS = 420.0
BODY = {"prompt": "def read(path):\n    with open(path) as file:\n", "max_tokens": 64, "ignore_eos": True}


@dataclass(slots=True)
class Load:
    """The answers of one phase, and their times."""

    seconds: list[float] = field(default_factory=list)  # of accepted requests
    statuses: Counter[str] = field(default_factory=Counter)
    retry_after: list[float] = field(default_factory=list)  # of refused requests
    elapsed: float = 0.0

    @property
    def rate(self) -> float:
        """Accepted requests per second."""
        return len(self.seconds) / self.elapsed

    async def send(self, client: httpx.AsyncClient, seed: int) -> None:
        body = BODY | {"temperature": 0.5, "seed": seed}
        started = time.perf_counter()
        try:
            answer = await client.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
            return
        self.statuses[str(answer.status_code)] += 1
        if answer.status_code == 200:
            self.seconds.append(time.perf_counter() - started)
        elif "retry-after" in answer.headers:
            self.retry_after.append(float(answer.headers["retry-after"]))


async def closed_loop(client: httpx.AsyncClient, clients: int, seconds: float) -> Load:
    """Send requests from `clients` clients; each waits for its answer before the next request."""
    load, started = Load(), time.perf_counter()

    async def user(number: int) -> None:
        count = 0
        while time.perf_counter() - started < seconds:
            await load.send(client, 100_000 * number + count)
            count += 1

    await asyncio.gather(*(user(number) for number in range(clients)))
    load.elapsed = time.perf_counter() - started
    return load


async def open_loop(client: httpx.AsyncClient, rate: float, seconds: float) -> Load:
    """Send requests at `rate` per second (Poisson arrivals), without waiting for answers."""
    load, started, arrivals = Load(), time.perf_counter(), random.Random(0)
    tasks: list[asyncio.Task[None]] = []
    due = started
    while due - started < seconds:
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        tasks.append(asyncio.create_task(load.send(client, len(tasks))))
        due += arrivals.expovariate(rate)
    await asyncio.gather(*tasks)
    load.elapsed = time.perf_counter() - started
    return load


def resident_megabytes(pid: int) -> float:
    """Return the resident memory of a process and all its descendants."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in table.splitlines()]
    family, grown = {pid}, True
    while grown:
        more = {child for child, parent, _ in rows if parent in family}
        grown = not more <= family
        family |= more
    return sum(size for child, _, size in rows if child in family) / 1024


@asynccontextmanager
async def server(arguments: argparse.Namespace) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """Start a server of this checkout; yield a client of it and its process id."""
    environment = os.environ | {
        "DIFFUSPEC_SCHEDULER__MAX_RUNNING": str(arguments.running),
        "DIFFUSPEC_SCHEDULER__MAX_WAITING": str(arguments.waiting),
    }
    command = [sys.executable, "-m", "service.cli", "serve", "--engine", arguments.engine]
    command += ["--threads", str(arguments.threads), "--port", str(arguments.port)]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
        url = f"http://127.0.0.1:{arguments.port}"
        try:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0) as client:
                await _wait_until_ready(client, process)
                yield client, process.pid
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 60)


async def _wait_until_ready(client: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.returncode is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the server did not become ready")


async def run(arguments: argparse.Namespace) -> int:
    async with server(arguments) as (client, pid):
        clients = arguments.running + arguments.waiting
        await closed_loop(client, clients, arguments.seconds / 4)  # warm
        at_capacity = await closed_loop(client, clients, arguments.seconds)
        before = resident_megabytes(pid)
        overloaded = await open_loop(client, arguments.factor * at_capacity.rate, arguments.seconds)
        after = resident_megabytes(pid)
        again = await closed_loop(client, clients, arguments.seconds / 2)
    print(f"{arguments.engine} engine, {arguments.running} places and {arguments.waiting} in the queue")
    print(f"{'':24}{'sent/s':>8}{'done/s':>8}{'median s':>10}{'p95 s':>8}{'longest':>9}  answers")
    loads = {"at capacity": at_capacity, f"{arguments.factor:g} times": overloaded, "afterwards": again}
    for name, load in loads.items():
        ordered = sorted(load.seconds)
        p95 = ordered[int(0.95 * (len(ordered) - 1))]
        sent = sum(load.statuses.values()) / load.elapsed
        print(
            f"{name:24}{sent:8.1f}{load.rate:8.1f}{statistics.median(ordered):10.3f}{p95:8.3f}{ordered[-1]:9.3f}"
            f"  {dict(load.statuses)}"
        )
    ratio = statistics.median(overloaded.seconds) / statistics.median(at_capacity.seconds)
    print(f"accepted requests took {ratio:.2f} times as long (medians); memory {before:.0f} -> {after:.0f} MB")
    if overloaded.retry_after:
        print(f"Retry-After: {min(overloaded.retry_after):g} to {max(overloaded.retry_after):g} s")
    print("\n".join(describe_environment().lines))
    unexpected = set(at_capacity.statuses + overloaded.statuses + again.statuses) - {"200", "429"}
    if unexpected:
        print(f"unexpected answers: {unexpected}")
    return 1 if unexpected or ratio > arguments.max_ratio else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["embedded", "vllm"], default="embedded")
    parser.add_argument("--running", type=int, default=8, help="requests at the same time")
    parser.add_argument("--waiting", type=int, default=4, help="requests in the queue")
    parser.add_argument("--factor", type=float, default=10.0, help="request rate, as a multiple of the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--max-ratio", type=float, default=1.5, help="largest ratio of the medians that is a success")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--port", type=int, default=8177)
    return asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
