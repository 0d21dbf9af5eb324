"""From the first second of the process to the last request of a drain; and clients that go away."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.engine.base import GenerationRequest, TokenDelta
from service.settings import load_settings
from service.text.tokenizer import TokenizerError
from service.wiring import build_metrics, build_tokenizer
from tests.integration.api_server import scripted_app, serving, wait_for
from tests.integration.scripted_engine import ScriptedEngine, Step, deltas


def endless(request: GenerationRequest) -> Iterator[Step]:
    for _ in range(10_000):
        yield TokenDelta(tokens=(97,))
        yield 0.01


def test_the_server_answers_while_it_loads(tiny_target: Path) -> None:
    engine = ScriptedEngine(lambda request: deltas("abc"), start_seconds=1.5)
    with serving(scripted_app(engine, tiny_target), wait_until_ready=False) as url:
        wait_for(lambda: httpx.get(url + "/startup").json()["progress"] == 0.5)
        startup = httpx.get(url + "/startup").json()
        assert startup["phase"] == "loading"
        assert startup["detail"] == "the script says so"
        assert httpx.get(url + "/health").status_code == 200
        ready = httpx.get(url + "/ready")
        assert ready.status_code == 503
        assert "loading" in ready.json()["error"]["message"]
        for answer in (httpx.post(url + "/v1/completions", json={"prompt": "x"}), httpx.get(url + "/v1/models")):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
        wait_for(lambda: httpx.get(url + "/ready").status_code == 200)
        assert httpx.get(url + "/startup").json()["phase"] == "ready"
        assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).json()["choices"][0]["text"] == "abc"


def test_a_model_that_cannot_be_loaded_is_reported_without_its_path(tiny_target: Path, tmp_path: Path) -> None:
    failures: list[Exception] = []

    def load() -> Any:
        raise TokenizerError(f"{tmp_path} holds no tokenizer.json")

    app = scripted_app(ScriptedEngine(lambda request: []), tiny_target, load_tokenizer=load, on_failure=failures.append)
    with serving(app, wait_until_ready=False) as url:
        wait_for(lambda: bool(failures))
        for path in ("/health", "/ready"):
            answer = httpx.get(url + path)
            assert answer.status_code == 503
            assert "dead" in answer.text
            assert str(tmp_path) not in answer.text


@pytest.mark.parametrize(("phase", "health"), [("hung", 503), ("dead", 503), ("draining", 200)])
def test_probes_tell_the_phases_apart(tiny_target: Path, phase: str, health: int) -> None:
    engine = ScriptedEngine(lambda request: deltas("abc"))
    with serving(scripted_app(engine, tiny_target)) as url:
        engine.phase = phase
        assert httpx.get(url + "/health").status_code == health
        assert httpx.get(url + "/ready").status_code == 503
        assert httpx.get(url + "/startup").json()["phase"] == phase
        assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 503


def test_a_client_that_goes_away_cancels_its_stream(tiny_target: Path) -> None:
    engine = ScriptedEngine(endless)
    with serving(scripted_app(engine, tiny_target)) as url:
        with httpx.stream("POST", url + "/v1/completions", json={"prompt": "x", "stream": True, "n": 3}) as answer:
            next(answer.iter_bytes())
        wait_for(lambda: list(engine.ended.values()) == ["cancelled"] * 3)
        metrics = httpx.get(url + "/metrics").text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 3.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_the_first_byte_cancels_too(tiny_target: Path, stream: bool) -> None:
    engine = ScriptedEngine(lambda request: [60.0] if stream else [*[TokenDelta(tokens=(97,))] * 3, 60.0])
    with serving(scripted_app(engine, tiny_target)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + "/v1/completions", json={"prompt": "x", "stream": stream}, timeout=0.5)
        wait_for(lambda: list(engine.ended.values()) == ["cancelled"])


def test_a_stop_string_cancels_what_would_go_on(tiny_target: Path) -> None:
    engine = ScriptedEngine(endless)
    with serving(scripted_app(engine, tiny_target)) as url:
        answer = httpx.post(url + "/v1/completions", json={"prompt": ["x", "y"], "stop": "aaa"})
        assert [choice["text"] for choice in answer.json()["choices"]] == ["", ""]
        assert answer.json()["usage"]["completion_tokens"] == 6
        assert list(engine.ended.values()) == ["cancelled"] * 2
        metrics = httpx.get(url + "/metrics").text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 2.0' in metrics


def test_responses_are_counted_by_route_whatever_a_client_asks_for(tiny_target: Path) -> None:
    with serving(scripted_app(ScriptedEngine(lambda request: deltas("abc")), tiny_target)) as url:
        assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 200
        assert httpx.post(url + "/v1/completions", json={"prompt": 1.5}).status_code == 400
        assert httpx.get(url + "/made/up").status_code == 404
        assert httpx.get(url + "/v1/models/made-up").status_code == 404
        metrics = httpx.get(url + "/metrics").text
    for route, status in (("/v1/completions", 200), ("/v1/completions", 400), ("unknown", 404)):
        assert f'diffuspec_http_responses_total{{model_name="tiny",route="{route}",status="{status}"}} 1.0' in metrics
    assert "made" not in metrics


def test_a_slow_body_is_not_waited_for(tiny_target: Path) -> None:
    settings = load_settings(overrides={"server.body_seconds": 0.3})
    with serving(scripted_app(ScriptedEngine(lambda request: []), tiny_target, settings)) as url:

        def slowly() -> Iterator[bytes]:
            yield b'{"prompt"'
            time.sleep(1.0)
            yield b': "x"}'

        answer = httpx.post(url + "/v1/completions", content=slowly(), headers={"content-type": "application/json"})
        assert answer.status_code == 408
        assert answer.json()["error"]["code"] == "body_timeout"


def test_one_line_is_logged_for_each_request_and_never_a_prompt(
    tiny_target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="service")
    with serving(scripted_app(ScriptedEngine(lambda request: deltas("a secret answer")), tiny_target)) as url:
        httpx.post(url + "/v1/completions", json={"prompt": "a secret prompt", "user": "a secret user"})
        httpx.post(url + "/v1/completions", json={"prompt": "a secret prompt", "n": "a secret"})
    lines = [record for record in caplog.records if record.name == "service.requests"]
    fields: list[dict[str, Any]] = [record.__dict__["fields"] for record in lines]
    assert [line["status"] for line in fields] == [200, 400]
    assert fields[0]["prompt_tokens"] == len("a secret prompt")
    assert fields[0]["completion_tokens"] == len("a secret answer")
    assert fields[0]["finish"] == "length"
    assert fields[1]["error"] == "invalid_value"
    assert "secret" not in caplog.text


async def test_the_application_drains_when_it_ends(tiny_target: Path) -> None:
    """Requests that run finish; new ones are refused."""
    engine = ScriptedEngine(lambda request: [TokenDelta(tokens=(97,)), 0.5, *deltas("bc")])
    settings = load_settings()
    app = create_app(settings, engine, lambda: build_tokenizer(tiny_target), build_metrics(settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110  # as a client would
                await asyncio.sleep(0.02)
            running = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"}))
            while not engine.seen:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            stopping = asyncio.create_task(app.state.serving.stop())
            await asyncio.sleep(0.05)
            assert (await http.get("/ready")).status_code == 503
            assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 503
            assert (await http.get("/health")).status_code == 200
            assert (await running).json()["choices"][0]["text"] == "abc"
            await stopping


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "service.cli", "serve", "--threads", "1", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_server_starts_serves_and_drains_on_sigterm(tiny_target: Path, tiny_drafter: Path) -> None:
    process = start("--target", str(tiny_target), "--drafter", str(tiny_drafter), "--port", "0")
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))  # type: ignore[union-attr]
    reader.start()
    try:
        wait_for(lambda: any("is ready on" in line for line in lines) or process.poll() is not None, 240)
        banner = "".join(lines)
        url = next(line.split(" on ")[1].split()[0] for line in lines if "is ready on" in line)
        body = json.loads(banner.partition("-d '")[2].partition("'\n")[0])
        curl = httpx.post(url + "/v1/completions", json=body)
        assert curl.status_code == 200
        assert "diffusion (qwen2, block, 0.0M, identical vocabulary) + own text" in banner
        slow = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=slow) as answer:
            pieces = answer.iter_text()
            next(pieces)
            process.send_signal(signal.SIGTERM)
            assert "[DONE]" in "".join(pieces)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def test_a_server_without_a_model_ends_with_one_sentence(tmp_path: Path) -> None:
    process = start("--target", str(tmp_path), "--port", "0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("diffuspec: cannot load the model: ")] == [
        f"diffuspec: cannot load the model: {tmp_path}/config.json does not exist."
    ]
    assert "Traceback" not in errors


def test_an_address_in_use_is_told_in_one_sentence(tiny_target: Path) -> None:
    with serving(scripted_app(ScriptedEngine(lambda request: []), tiny_target)) as url:
        process = start("--target", str(tiny_target), "--port", url.rpartition(":")[2])
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert "cannot listen" in errors
