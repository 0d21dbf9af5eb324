"""`diffuspec serve --engine vllm` as a process: clients that leave, a drafter that fails, a worker that is killed."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.vllm.patches import parent_of
from tests.integration.api_server import wait_for

PORT = 8157
START_SECONDS = 420
MAX_RUNNING, MAX_WAITING = 8, 24
HANG_SECONDS = 15  # far more than a step of the tiny model takes on a busy machine
BODY = {"prompt": "def f(x):\n    return f(x) + ", "max_tokens": 300, "temperature": 0, "ignore_eos": True}


class Server:
    """The process and its lines on stderr so far."""

    def __init__(self, target: Path, drafter: Path) -> None:
        environment = os.environ | {
            "DIFFUSPEC_VLLM__PIPELINE": "tests.vllm.pipelines:make_failing",
            "DIFFUSPEC_SCHEDULER__MAX_RUNNING": str(MAX_RUNNING),
            "DIFFUSPEC_SCHEDULER__MAX_WAITING": str(MAX_WAITING),
            "DIFFUSPEC_SCHEDULER__HANG_SECONDS": str(HANG_SECONDS),
        }
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self.url = f"http://127.0.0.1:{PORT}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", "--engine", "vllm", "--threads", "1", "--port", str(PORT),
             "--target", str(target), "--drafter", str(drafter)],
            stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "".join(self.lines[-30:])
        try:
            return httpx.get(self.url + "/ready").status_code == 200
        except httpx.TransportError:
            return False

    def text(self) -> str:
        answer = httpx.post(self.url + "/v1/completions", json=BODY, timeout=300)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(httpx.get(self.url + "/metrics").text)
        values = [sample.value for family in families for sample in family.samples if sample.name == name]
        assert values, f"{name} is not shown"
        return sum(values)

    def worker_pids(self) -> list[int]:
        """Process ids of the server's descendants that are workers."""
        table = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in table.splitlines()[1:]]
        known, grown = {self.process.pid}, True
        while grown:
            found = {int(pid) for pid, parent, _ in rows if int(parent) in known}
            grown = not found <= known
            known |= found
        return [int(pid) for pid, _, name in rows if int(pid) in known and "Worker" in name]


def test_vllms_processes_end_with_a_service_that_was_killed_outright() -> None:
    """With stand-ins for the three processes: the service, vLLM's engine process and a worker that holds the line."""
    script = """
import multiprocessing, os, sys, time
from service.engine.vllm import patches

def worker():
    patches.POLL_SECONDS = patches.GRACE_SECONDS = 0.1
    patches.hold_lifeline()
    print(os.getppid(), os.getpid(), flush=True)
    time.sleep(120)

def core():
    process = multiprocessing.get_context("spawn").Process(target=worker, name="VllmWorker-0")
    process.start()
    process.join()

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=core, name="EngineCore").start()
    time.sleep(120)
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        service = subprocess.Popen([sys.executable, file.name], stdout=subprocess.PIPE, text=True)
        assert service.stdout is not None
        pids = [int(part) for part in service.stdout.readline().split()]
        assert all(parent_of(pid) is not None for pid in pids)
        service.kill()
        service.wait()
        service.stdout.close()
        wait_for(lambda: all(parent_of(pid) is None for pid in pids), 30)


@pytest.fixture(scope="module")
def server(tiny_folders: tuple[Path, Path]) -> Iterator[Server]:
    server = Server(*tiny_folders)
    try:
        wait_for(server.is_ready, START_SECONDS)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            try:
                server.process.wait(60)
            except subprocess.TimeoutExpired:
                server.process.kill()


def test_a_failing_drafter_is_seen_and_comes_back(server: Server) -> None:
    assert server.metric("diffuspec_drafter_up") == 1
    first = server.text()  # the drafter fails at step 37
    wait_for(lambda: server.metric("diffuspec_drafter_failures_total") == 1, 30)
    assert any("the drafter" in line and "step 37" in line for line in server.lines)
    assert httpx.get(server.url + "/ready").status_code == 200
    wait_for(lambda: server.metric("diffuspec_drafter_up") == 1, 30)
    drafts = server.metric("vllm:spec_decode_num_drafts_total")
    assert server.text() == first
    assert server.metric("vllm:spec_decode_num_drafts_total") > drafts
    assert server.metric("diffuspec_drafter_failures_total") == 1


def test_200_clients_that_leave_midway_change_nothing_for_others(server: Server) -> None:
    expected = server.text()

    def leave(number: int) -> None:
        with httpx.stream(
            "POST", server.url + "/v1/completions", json=BODY | {"stream": True, "max_tokens": 200}, timeout=300
        ) as answer:
            for count, _ in enumerate(answer.iter_lines()):
                if count >= number % 7:
                    return

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        staying = [pool.submit(server.text) for _ in range(4)]
        leaving = [pool.submit(leave, number) for number in range(200)]
        for future in leaving:
            future.result()
        assert [future.result() for future in staying] == [expected] * 4
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 60)
    assert server.text() == expected
    answers = httpx.get(server.url + "/metrics").text
    assert answers.count("# TYPE vllm:num_requests_running gauge") == 1


def test_what_the_queue_cannot_hold_is_told_when_to_come_back(server: Server) -> None:
    expected = server.text()
    with httpx.Client(limits=httpx.Limits(max_connections=None), timeout=300) as client:

        def ask(_: int) -> httpx.Response:
            return client.post(server.url + "/v1/completions", json=BODY)

        with concurrent.futures.ThreadPoolExecutor(3 * (MAX_RUNNING + MAX_WAITING)) as pool:
            answers = list(pool.map(ask, range(3 * (MAX_RUNNING + MAX_WAITING))))
    accepted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(accepted) + len(refused) == len(answers)
    assert len(accepted) >= MAX_RUNNING + MAX_WAITING  # as many as there is room for, and no more at a time
    assert refused
    assert {answer.json()["choices"][0]["text"] for answer in accepted} == {expected}
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, 60)
    assert server.text() == expected


def test_a_stopped_worker_shows_as_hung_until_it_goes_on(server: Server) -> None:
    expected = server.text()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.text)
        wait_for(lambda: server.metric("vllm:num_requests_running") >= 1, 60)
        pids = server.worker_pids()
        assert pids
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: httpx.get(server.url + "/ready").status_code == 503, HANG_SECONDS + 30)
            assert httpx.get(server.url + "/health").json()["error"]["code"] == "engine_hung"
            assert not waiting.done()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        assert waiting.result() == expected
    wait_for(lambda: httpx.get(server.url + "/ready").status_code == 200, 30)


def test_a_killed_worker_ends_the_server_with_an_error_after_answering(server: Server) -> None:
    """The last test of this file: nothing is left to test afterwards."""
    results: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            results.append(httpx.post(server.url + "/v1/completions", json=BODY | {"max_tokens": 450}, timeout=300))
        except httpx.HTTPError as error:
            results.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: server.metric("vllm:num_requests_running") >= 1, 60)
    pids = server.worker_pids()
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    thread.join(120)
    assert not thread.is_alive()
    deadline = time.monotonic() + 120
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.process.returncode == 1
    (result,) = results
    assert isinstance(result, httpx.Response)
    assert result.status_code in (500, 503)
    assert set(result.json()) == {"error"}
    assert any("the engine has died" in line for line in server.lines)
