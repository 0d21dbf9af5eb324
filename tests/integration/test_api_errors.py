"""What is wrong is refused with a 4xx that names the field, in one shape, on every route; nobody else notices."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.engine.base import (
    EngineUnavailableError,
    GenerationRequest,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
    TokenDelta,
)
from service.settings import load_settings
from tests.integration.api_server import scripted_app, serving
from tests.integration.scripted_engine import ScriptedEngine, Step, deltas

TEXT = "héllo wörld 🙂 and more"


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


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, in the one shape there is."""
    content = answer.json()
    assert set(content) == {"error"}
    error: dict[str, Any] = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    return error


def refused(http: httpx.Client, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    return error_of(answer)


HUGE = 10**300
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [272]}, "prompt"),
    ({"prompt": [HUGE]}, "prompt"),
    ({"prompt": ["x"] * 65}, "prompt"),
    ({"prompt": "x" * 513}, "prompt"),
    ({"prompt": "x", "max_tokens": 512}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 5.5}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "max_tokens": HUGE}, "max_tokens"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": 2.1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "temperature": HUGE}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "min_p": 1.5}, "min_p"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "frequency_penalty": -3}, "frequency_penalty"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 17}, "n"),
    ({"prompt": "x", "n": 10**9}, "n"),
    ({"prompt": ["x"] * 64, "n": 16}, "n"),
    ({"prompt": "x", "best_of": 2}, "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "stop": list("abcde")}, "stop"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop"),
    ({"prompt": "x", "stop": "s" * 1025}, "stop"),
    ({"prompt": "x", "stop_token_ids": [272]}, "stop_token_ids"),
    ({"prompt": "x", "stop_token_ids": []}, "stop_token_ids"),
    ({"prompt": "x", "logit_bias": {"272": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"²": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": None}}, "logit_bias.1"),
    ({"prompt": "x", "allowed_token_ids": [272]}, "allowed_token_ids"),
    ({"prompt": "x", "allowed_token_ids": [256], "min_tokens": 1}, "allowed_token_ids"),
    ({"prompt": "x", "bad_words": [""]}, "bad_words[0]"),
    ({"prompt": "x", "bad_words": ["a"] * 129}, "bad_words"),
    ({"prompt": "x", "allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "seed": 1.5}, "seed"),
    ({"prompt": "x", "priority": HUGE}, "priority"),
    ({"prompt": "x", "user": 7}, "user"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"prompt": "x", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
    ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt": "x", "structured_outputs": {"regex": "a*"}}, "structured_outputs"),
    ({"prompt": "x", "speculative": {"policy": "best"}}, "speculative.policy"),
    ({"prompt": "x", "speculative": {"max_draft_tokens": 17}}, "speculative.max_draft_tokens"),
    ({"prompt": "x", "speculative": {"drafter": "x"}}, "speculative.drafter"),
    ({"prompt": "x", "speculative": True}, "speculative"),
    ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"prompt": "x", "tempreature": 1}, "tempreature"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_field_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    error = refused(http, body)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


USER = {"role": "user", "content": "hi"}
WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content"),
    ({"messages": [{**USER, "color": 1}]}, "messages[0].color"),
    ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    ({"messages": [USER], "tools": [{"type": "function"}]}, "tools"),
    ({"messages": [USER], "tool_choice": "auto"}, "tool_choice"),
    ({"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
    ({"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
    ({"messages": [USER], "logprobs": 3}, "logprobs"),
    ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": [USER], "echo": True}, "echo"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt"),
    ({"messages": [USER] * 1025}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), WRONG_CHATS, ids=lambda value: str(value)[:50])
def test_a_wrong_field_of_a_chat_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert refused(http, body, "/v1/chat/completions")["param"] == param


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(http: httpx.Client) -> None:
    error = refused(http, {"prompt": "x" * 500, "max_tokens": 13})
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("512", "500", "13"))


def test_a_clients_unset_fields_are_no_fields(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    body = dict.fromkeys(schema["properties"]) | {"prompt": "x"}
    assert http.post("/v1/completions", json=body).status_code == 200
    harmless = {"stop": [], "best_of": 1, "response_format": {"type": "text"}, "speculative": {}, "n": 1, "user": "u"}
    assert http.post("/v1/completions", json={"prompt": "x", **harmless}).status_code == 200


NONSENSE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"prompt"',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "user": "\\udc00"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": ' + b"[" * 50_000,
    b'{"prompt": ' + b"[" * 150 + b"]" * 150 + b"}",
    b'{"prompt": "x", "user": ' + b'{"a":' * 10_000,
    b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x",}',
    b"\xef\xbb\xbf{}",
    b"\x00",
]


@pytest.mark.parametrize("content", NONSENSE, ids=lambda content: repr(content[:40]))
def test_nonsense_is_refused(http: httpx.Client, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        error_of(answer)


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


def test_keys_are_asked_for_where_there_are_any(tiny_target: Path) -> None:
    secured = load_settings(overrides={"model.served_model_name": "tiny", "auth.api_keys": ["one", "two"]})
    with serving(scripted_app(ScriptedEngine(script), tiny_target, secured)) as url:
        for headers in (
            {},
            {"authorization": "Bearer three"},
            {"authorization": "Basic one"},
            {"authorization": "Bearer é"},
        ):
            raw = {name: value.encode() for name, value in headers.items()}
            answer = httpx.post(url + "/v1/completions", json={"prompt": "x"}, headers=raw)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
        for key in ("one", "two"):
            answer = httpx.post(
                url + "/v1/completions", json={"prompt": "x"}, headers={"authorization": f"Bearer {key}"}
            )
            assert answer.status_code == 200
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/v1/models").status_code == 401


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "best_of",
    "stream", "stream_options", "logprobs", "top_logprobs", "echo", "stop", "stop_token_ids", "logit_bias", "x",
    "ignore_eos", "include_stop_str_in_output",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "allowed_token_ids",
    "bad_words", "seed", "user", "priority", "response_format", "structured_outputs", "skip_special_tokens", "suffix",
    "return_token_ids", "truncate_prompt_tokens", "speculative", "tools", "max_completion_tokens", "tokens",
]  # fmt: skip
PLAUSIBLE = {
    "prompt": st.text(max_size=5)
    | st.lists(st.integers(-1, 300), max_size=3)
    | st.lists(st.text(max_size=3), max_size=3),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": JSON}), max_size=2
    ),
    "max_tokens": st.integers(-1, 600),
    "logprobs": st.integers(-1, 22) | st.booleans(),
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=5),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str), st.floats(-120, 120), max_size=3),
    "speculative": st.dictionaries(
        st.sampled_from(["enabled", "max_draft_tokens", "policy", "trace", "x"]), JSON, max_size=2
    ),
}
BODY = st.dictionaries(st.sampled_from(FIELDS), st.none(), max_size=6).flatmap(
    lambda names: st.fixed_dictionaries({name: PLAUSIBLE.get(name, JSON) | JSON for name in names})
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]), BODY)
def test_no_body_ever_makes_the_server_fail(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = http.post(
        path, content=json.dumps(body).encode("utf-8", "surrogatepass"), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error_of(answer)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_no_bytes_ever_make_the_server_fail(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error_of(answer)
