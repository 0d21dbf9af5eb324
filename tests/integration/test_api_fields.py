"""Wrong fields and nonsense: every one is refused with a 400 that names the field, and none makes the server fail."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.api_server import error_of, scripted_app, serving
from tests.integration.scripted_engine import ScriptedEngine, deltas


@pytest.fixture(scope="module")
def http(tiny_target: Path) -> Iterator[httpx.Client]:
    app = scripted_app(ScriptedEngine(lambda request: deltas("some text")), tiny_target)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as http:
        yield http


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
    ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type"),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
    ({"prompt": "x", "response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format"),
    (
        {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        "response_format",
    ),
    ({"prompt": "x", "structured_outputs": {}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"regex": "a" * 65537}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"grammar": "start: missing"}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"prompt": "x", "structured_outputs": {"choice": ["a", ""]}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"choice": ["a"] * 257}}, "structured_outputs.choice"),
    ({"prompt": "x", "structured_outputs": {"json": "{"}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"json": {"$ref": "http://127.0.0.1/schema"}}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    (
        {"prompt": "x", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
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
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content"),
    ({"messages": [{**USER, "color": 1}]}, "messages[0].color"),
    ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].type"),
    ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0].function"),
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


@pytest.mark.parametrize("empty", [None, False, "", [], {}])
def test_an_unsupported_field_may_be_sent_empty(http: httpx.Client, empty: Any) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "suffix": empty})
    assert answer.status_code == 200, answer.text
    assert refused(http, {"prompt": "x", "suffix": 0})["param"] == "suffix"


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
    "return_token_ids", "truncate_prompt_tokens", "speculative", "tools", "tool_choice", "max_completion_tokens",
    "tokens",
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
