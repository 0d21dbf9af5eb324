"""Whatever the body, the server answers or refuses it: never a 5xx, never an error inside a stream."""

import asyncio
import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from service.engine.base import GenerationRequest, TokenDelta
from service.settings import load_settings
from tests.checkpoints import HERMES_TEMPLATE, write_tokenizer
from tests.fuzz.reader import ByteReader
from tests.integration.api_server import scripted_app
from tests.integration.scripted_engine import ScriptedEngine, deltas

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
TEXT = 'Yes.\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
USER = {"role": "user", "content": "hi"}
BODIES: list[tuple[int, dict[str, Any]]] = [
    (0, {"prompt": "import os", "max_tokens": 4, "stop": ["\n"], "logprobs": 2, "n": 2, "seed": 1}),
    (0, {"prompt": [[1, 2], [3]], "echo": True, "max_tokens": 0, "logit_bias": {"5": -1.5}, "bad_words": ["a"]}),
    (0, {"prompt": "x", "structured_outputs": {"regex": "a|b"}, "speculative": {"policy": "fixed", "trace": True}}),
    (0, {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}, "allowed_token_ids": [97]}),
    (1, {"messages": [USER], "tools": [TOOL], "stream": True, "n": 2, "parallel_tool_calls": False}),
    (1, {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    (1, {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "x",
        "tool_call_id": "1"}], "logprobs": True, "top_logprobs": 1, "max_completion_tokens": 3}),
    (1, {"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}], "response_format":
        {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}),
    (2, {"messages": [USER], "tools": [TOOL], "add_generation_prompt": False, "return_token_strs": True}),
    (3, {"tokens": [104, 105, 256]}),
]  # fmt: skip
WORDS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**64, 1.5, 1e308, "", "f", "a", "\n", "\x00", "é", [], {}, "auto", "none"),
    *("required", "function", "object", "user", "assistant", "tool", "developer", "text", "json_schema", "json_object"),
    *(USER, TOOL, CALL, [USER], [TOOL], [CALL], [1, 2], [[1], [2]], ["a"], {"name": "f"}, {"a": 1}, '{"a": 1}', "$ref"),
    *({"type": "object"}, {"regex": "a+"}, {"choice": ["a"]}, {"grammar": 'start: "a"'}, {"json": {}}),
    *({"type": "function", "function": {"name": "f"}}, {"$ref": "#"}, {"anyOf": [{"$ref": "#"}, {"const": 1}]}, 300),
    *(257, {"enabled": True}, {"policy": "paper"}),
)  # fmt: skip
SEEDS = [bytes([2 * path]) + json.dumps(body).encode() for path, body in BODIES]
SEEDS += [bytes([2 * path + 1, index, 1, 2, 3, 4, 5, 6]) for index, (path, _) in enumerate(BODIES)]


@functools.cache
def running() -> tuple[asyncio.AbstractEventLoop, FastAPI]:
    """Return a server over an engine that writes a tool call, and its event loop."""

    def play(request: GenerationRequest) -> list[TokenDelta]:
        return deltas(TEXT, sizes=[3, 9, 1, 30], finish_reason="stop")

    engine = ScriptedEngine(play, context_length=2048)
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder, HERMES_TEMPLATE)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        app = scripted_app(engine, folder, load_settings(overrides={"model.served_model_name": "tiny"}))
        loop.run_until_complete(app.state.serving.start())
    return loop, app


def close() -> None:
    """Stop the server."""
    loop, app = running()
    loop.run_until_complete(app.state.serving.stop())
    loop.close()
    running.cache_clear()


CONFIG = {
    **{"model_type": "qwen2", "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 256},
    **{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "architectures": ["Qwen2ForCausalLM"]},
    **{"hidden_act": "silu"},
}


def check(data: bytes) -> None:
    reader = ByteReader(data)
    kind = reader.byte()
    path = PATHS[(kind >> 1) % len(PATHS)]
    body = mutated(reader) if kind & 1 else reader.rest()
    loop, app = running()
    status, answer = loop.run_until_complete(asyncio.wait_for(post(app, path, body), 20))
    assert status < 500, (path, body, answer)
    assert status != 404 or b"model_not_found" in answer, (path, body, answer)
    if status != 200:
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
    assert b"internal_error" not in answer or b"internal_error" in body, (path, body, answer)


def mutated(reader: ByteReader) -> bytes:
    """Return one of the bodies, with values changed, added or dropped as the bytes say."""
    content = copy.deepcopy(reader.pick(BODIES)[1])
    names = sorted({name for _, body in BODIES for name in body})
    for _ in range(8):
        if reader.is_empty:
            break
        place: Any = content
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            number = reader.byte()
            if not keys or number >= 200:  # add something here
                key: Any = reader.pick(names) if isinstance(place, dict) else len(place)
                break
            key = keys[number % len(keys)]
            if number >= 100 or not isinstance(place[key], dict | list):
                break
            place = place[key]
        value = copy.deepcopy(reader.pick(WORDS))
        if isinstance(place, list) and key == len(place):
            place.append(value)
        elif reader.byte() < 240:
            place[key] = value
        elif isinstance(place, dict):
            place.pop(key, None)
        else:
            del place[key]
    return json.dumps(content).encode()


async def post(app: FastAPI, path: str, body: bytes) -> tuple[int, bytes]:
    """Send a request by ASGI, without a socket. Returns status and body of the answer."""
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path},
        **{"raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http"},
        **{"headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80)},
    }
    sent: list[dict[str, Any]] = []
    has_sent_body = False

    async def receive() -> dict[str, Any]:
        nonlocal has_sent_body
        if has_sent_body:
            await asyncio.Event().wait()
        has_sent_body = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert sent[0]["type"] == "http.response.start"
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
