"""What is wrong is refused with a 4xx that names the field, in one shape, on every route; nobody else notices."""

import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.engine.base import (
    EngineUnavailableError,
    GenerationRequest,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
    TokenDelta,
)
from service.settings import load_settings
from tests.integration.api_server import error_of, scripted_app, serving
from tests.integration.scripted_engine import ScriptedEngine, Step, deltas

TEXT = "héllo wörld 🙂 and more"


USER = {"role": "user", "content": "hi"}


def script(request: GenerationRequest) -> list[Step]:
    """What happens is written in the prompt."""
    match bytes(request.prompt).decode("utf-8", "replace"):
        case "queue full":
            return [QueueFullError("32 requests run and 256 wait", 2.5)]
        case "unavailable":
            return [EngineUnavailableError("the server is shutting down")]
        case "failed":
            return [RequestFailedError("index 7 is out of bounds in /srv/secret/model.py")]
        case "crash":
            return [RuntimeError("secret")]
        case "timeout":
            return [RequestTimeoutError("the request did not finish within 1 seconds")]
        case "failed later":
            return [*deltas("abc", sizes=(1, 1))[:2], RequestFailedError("secret")]
        case "crash later":
            return [*deltas("abc", sizes=(1, 1))[:2], RuntimeError("secret")]
        case "aborted":
            return [TokenDelta(tokens=(97,)), TokenDelta(finish_reason="abort")]
        case _:
            return list(deltas(TEXT, sizes=(2, 1, 3, 1, 1, 4)))


@pytest.fixture(scope="module")
def url(tiny_target: Path) -> Iterator[str]:
    limits = load_settings(overrides={"model.served_model_name": "tiny", "server.max_body_bytes": 100_000})
    with serving(scripted_app(ScriptedEngine(script), tiny_target, limits)) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as http:
        yield http


def test_a_body_that_is_too_large_gets_its_answer(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x" * 10_000_000})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"


def test_a_body_without_end_is_cut_off(url: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += 1 << 20
            yield b" " * (1 << 20)

    try:
        headers = {"content-type": "application/json"}
        assert httpx.post(url + "/v1/completions", content=endless(), headers=headers).status_code == 413
    except (httpx.WriteError, httpx.ReadError):
        pass  # cut off before the answer could be read
    assert sent < 150 << 20


def test_a_declared_length_is_believed_at_once(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {10**12}\r\n\r\n{{".encode())
        answer = connection.makefile("rb").read()  # to the end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_other_media_types_are_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    answer = http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 415
    error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PUT", "/metrics", 405),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_every_route_answers_in_the_one_shape(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    error_of(answer)
    if status == 405:
        assert answer.headers["allow"]


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [USER]}),
        ("/tokenize", {"prompt": "x"}),
    ):
        answer = http.post(path, json={**body, "model": "gpt-4"})
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "status"),
    [("queue full", 429), ("unavailable", 503), ("failed", 500), ("crash", 500), ("timeout", 504)],
)
def test_what_the_engine_refuses_is_told_before_the_first_byte(
    http: httpx.Client, prompt: str, status: int, stream: bool
) -> None:
    answer = http.post("/v1/completions", json={"prompt": prompt, "stream": stream})
    assert answer.status_code == status
    error_of(answer)
    if status == 429:
        assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("prompt", ["failed later", "crash later"])
def test_what_fails_in_the_middle_is_told_in_the_stream(http: httpx.Client, prompt: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": prompt, "stream": True})
    assert answer.status_code == 200
    frames = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in frames[:-1]) == "ab"
    last = json.loads(frames[-1])
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "[DONE]" not in answer.text
    assert http.post("/v1/completions", json={"prompt": prompt}).status_code == 500


def test_the_openai_client_raises_what_fails_in_the_middle(url: str) -> None:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="tiny", prompt="failed later", stream=True)
        with pytest.raises(openai.APIError, match="failed"):
            list(stream)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="queue full")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="x", temperature=3)
        assert caught.value.param == "temperature"


def test_one_failing_prompt_ends_the_request_and_cancels_the_others(tiny_target: Path) -> None:
    engine = ScriptedEngine(
        lambda request: [TokenDelta(tokens=(97,)), 60.0] if request.prompt[0] == 97 else [0.1, RequestFailedError("no")]
    )
    with serving(scripted_app(engine, tiny_target)) as url:
        answer = httpx.post(url + "/v1/completions", json={"prompt": ["a", "b", "a"]})
        assert answer.status_code == 500
    assert sorted(engine.ended.values()) == ["cancelled", "cancelled", "failed"]


def test_an_aborted_request_is_an_error_not_a_short_text(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "aborted"}).status_code == 503
    streamed = http.post("/v1/completions", json={"prompt": "aborted", "stream": True}).text
    assert '"not_ready"' in streamed
    assert "[DONE]" not in streamed


def test_text_waits_for_whole_characters_and_for_stop_strings(http: httpx.Client) -> None:
    def chunks(**body: Any) -> list[str]:
        text = http.post("/v1/completions", json={"prompt": "x", "stream": True, **body}).text
        frames = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert frames[-1] == "[DONE]"
        return [json.loads(line)["choices"][0]["text"] for line in frames[:-1]]

    assert "".join(chunks()) == TEXT
    assert "�" not in "".join(chunks())
    assert "".join(chunks(stop=["wörld"])) == "héllo "
    assert "".join(chunks(stop=["wörlds", "🙂 a"], include_stop_str_in_output=True)) == "héllo wörld 🙂 a"
    assert "".join(chunks(stop=["more!"])) == TEXT
    assert "".join(chunks(stop="h", min_tokens=4)) == TEXT


def test_request_ids_are_echoed_only_if_plain(http: httpx.Client) -> None:
    def echoed(given: str) -> str:
        return http.get("/version", headers={"x-request-id": given}).headers["x-request-id"]

    assert echoed("trace-42.a_B") == "trace-42.a_B"
    for strange in ("x" * 65, "http://10.0.0.1/", "a b", "a\tb", "{}"):
        assert echoed(strange) != strange


def test_headers_tell_times(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x"})
    assert int(answer.headers["openai-processing-ms"]) >= 0
    assert int(answer.headers["x-queue-time-ms"]) >= 0
    assert "content-type" in answer.headers


def test_a_dead_engine_names_no_file(tiny_target: Path) -> None:
    from service.engine.embedded import EmbeddedEngine, Progress
    from service.engine.scheduler import SchedulerLimits
    from tests.unit.engine.drafters import no_drafts
    from tests.unit.engine.serving import verifier
    from transformer.model import Transformer
    from verifiers.base import VerifyRequest, VerifyResult
    from verifiers.torch_lm import TorchVerifier

    class Failing(TorchVerifier):
        def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult]:
            if any(request.rules.seed == 13 for request in requests):
                raise RuntimeError("cannot open /srv/secret/weights.bin")
            return super().verify(requests)

    def load(progress: Progress) -> tuple[TorchVerifier, Any]:
        loaded = verifier(Transformer.load(tiny_target))
        loaded.__class__ = Failing
        return loaded, no_drafts()

    with serving(scripted_app(EmbeddedEngine(load, SchedulerLimits()), tiny_target)) as url:
        answers = [httpx.post(url + "/v1/completions", json={"prompt": "x", "seed": 13}) for _ in range(5)]
        answers += [httpx.get(url + path) for path in ("/health", "/ready", "/startup")]
    assert [answer.status_code for answer in answers[:3]] == [500] * 3
    assert [answer.status_code for answer in answers[3:]] == [503] * 4 + [200]
    assert not any("secret" in answer.text for answer in answers)
