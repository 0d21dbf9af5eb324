"""The API's description. Bodies are read by hand, for their limits and errors, so their schemas are added by hand."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from service.api import schemas
from service.api.examples import ANSWERS, CHUNKS
from service.api.middleware import OPEN_PATHS
from service.api.responses import ChatCompletionChunk, ErrorBody

DESCRIPTION = """OpenAI-compatible completions by lossless speculative decoding: a diffusion language model drafts, the
target model verifies, and the text is the one that the target alone would have written.

**Beyond OpenAI's API:** the field `speculative` steers the drafting for a request; answers say in
`metrics.speculative_decoding` how much was drafted and accepted; vLLM's sampling fields (`top_k`, `min_p`,
`structured_outputs`, ...) and its `/tokenize` and `/detokenize` work, too.

**Errors** have one shape, `{"error": {"message", "type", "param", "code"}}`. An unknown field is an error.
`Retry-After` says when a refused request is worth another try.

**Streams** are server-sent events, each `data: ` and a chunk as JSON; the last is `data: [DONE]`. An error after the
first chunk comes as an event in the shape of errors.
"""
TAGS = [
    {"name": "text", "description": "Completions of texts and conversations."},
    {"name": "models", "description": "The served model."},
    {"name": "tokens", "description": "From text to token ids and back."},
    {"name": "operations", "description": "For probes, Prometheus and operators."},
]
REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.CompletionRequest,
    schemas.ChatCompletionRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
)
REFERENCE = "#/components/schemas/{model}"
# By status: its meaning, and an example of an error: type, code, field and message.
ERRORS: dict[int, tuple[str, str, str, str | None, str]] = {
    400: (
        "A field is wrong; `param` names it.",
        *("invalid_request_error", "invalid_value", "top_p"),
        "top_p: input should be less than or equal to 1.",
    ),
    401: (
        "The API key is missing or wrong.",
        *("authentication_error", "invalid_api_key", None),
        "Send one of this server's API keys, not expired, as Authorization: Bearer KEY.",
    ),
    404: (
        "There is no such model.",
        *("not_found_error", "model_not_found", "model"),
        "There is no model 'gpt' here; this server has 'diffuspec-python'.",
    ),
    408: (
        "The body did not arrive in time.",
        *("invalid_request_error", "body_timeout", None),
        "The body did not arrive within 30 seconds.",
    ),
    413: (
        "The body is too large.",
        *("invalid_request_error", "body_too_large", None),
        "The body is larger than the 1048576 bytes that this server takes.",
    ),
    415: (
        "The body is not sent as JSON.",
        *("invalid_request_error", "unsupported_media_type", None),
        "Send the body as JSON with the header Content-Type: application/json.",
    ),
    429: (
        "The queue is full, or the key's limit is reached; `Retry-After` says when to come again.",
        *("rate_limit_error", "queue_full", None),
        "256 sequences are waiting already.",
    ),
    500: (
        "The server failed on this request.",
        *("internal_error", "internal_error", None),
        "The server failed on this request; its log says why.",
    ),
    503: (
        "Not ready: loading, draining, hung or dead; or more connections are open than the server takes "
        "(`too_many_connections`). With `Retry-After` where another try is worth it.",
        *("service_unavailable_error", "not_ready", None),
        "The server is loading: reading the target.",
    ),
    504: (
        "The request took longer than its `timeout`, or than the server allows.",
        *("timeout_error", "request_timeout", None),
        "The request did not end within 10 seconds.",
    ),
}
HEADERS: dict[str, dict[str, Any]] = {
    "x-request-id": {
        "description": "The request's own `X-Request-Id` if that is short and plain, else a new one; the log has it.",
        "schema": {"type": "string"},
    },
    "openai-processing-ms": {
        "description": "Milliseconds until the answer began.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "x-queue-time-ms": {
        "description": "Milliseconds that the request waited in the queue.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Retry-After": {
        "description": "Seconds after which another try is worth it.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"description": "Always `Bearer`.", "schema": {"type": "string"}},
}
EVERY_ANSWER = ("x-request-id", "openai-processing-ms")


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """Describe a route's body."""
    reference = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def answers(model: Any, *statuses: int, stream: Any = None) -> dict[int | str, dict[str, Any]]:
    """Describe a route's answers; `stream` is the chunk of its streams, if it has any.

    500 may come from every route, and 400 comes with every route that takes a body, which 415 tells.
    """
    codes = {500, *statuses, 400} if 415 in statuses else {500, *statuses}
    content: dict[str, Any] = {"application/json": {"examples": _example(model.__name__)}}
    if stream is not None:
        content["text/event-stream"] = {"schema": _event(stream), "example": {"data": CHUNKS[stream.__name__][0]}}
    headers = _headers(*EVERY_ANSWER, *(["x-queue-time-ms"] if stream is not None else []))
    done = {"model": model, "description": "Done.", "headers": headers, "content": content}
    return {200: done, **{code: {"model": ErrorBody, **_error(code)} for code in sorted(codes)}}


def _event(chunk: Any) -> dict[str, Any]:
    """Describe one event of a stream: OpenAPI before 3.2 has no other way to describe a stream."""
    chunk_or_error = [{"$ref": REFERENCE.format(model=model.__name__)} for model in (chunk, ErrorBody)]
    return {
        "type": "object",
        "description": "With `stream`, one event: a chunk or an error as JSON; the last one is `[DONE]`.",
        "required": ["data"],
        "properties": {
            "data": {
                "anyOf": [
                    {"const": "[DONE]"},
                    {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"anyOf": chunk_or_error},
                    },
                ]
            }
        },
    }


def _error(status: int) -> dict[str, Any]:
    names = {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}.get(status, [])
    return {
        "description": ERRORS[status][0],
        "headers": _headers(*EVERY_ANSWER, *names),
        "content": {"application/json": {"examples": _example(f"error_{status}")}},
    }


def _example(name: str) -> dict[str, Any]:
    """Refer to an example: FastAPI drops every null from examples that are given in place."""
    return {name: {"$ref": f"#/components/examples/{name}"}}


def _examples() -> dict[str, Any]:
    errors = {
        f"error_{status}": {"error": {"message": message, "type": kind, "param": param, "code": code}}
        for status, (_, kind, code, param, message) in ERRORS.items()
    }
    return {name: {"value": value} for name, value in {**ANSWERS, **errors}.items()}


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def install_openapi(app: FastAPI, *, is_secured: bool) -> None:
    """Replace the generated description by one with request bodies, and with keys where they are asked for."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, is_secured=is_secured)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way


def _describe(app: FastAPI, *, is_secured: bool) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=DESCRIPTION,
        routes=app.routes,
        tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    components = document.setdefault("components", {})
    components["headers"] = HEADERS
    components["examples"] = _examples()
    _, requests = models_json_schema([(model, "validation") for model in REQUESTS], ref_template=REFERENCE)
    chunk = TypeAdapter(ChatCompletionChunk).json_schema(ref_template=REFERENCE)  # no route answers one by itself
    chunk_types = chunk.pop("$defs")
    known = components.setdefault("schemas", {})
    components["schemas"] = {ChatCompletionChunk.__name__: chunk, **chunk_types, **known, **requests["$defs"]}
    if is_secured:
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "One of the server's API keys."}
        }
        for path, methods in document["paths"].items():
            if path not in OPEN_PATHS:
                for operation in methods.values():
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = _refused(401)
    return document


def _refused(status: int) -> dict[str, Any]:
    response = _error(status)
    response["content"]["application/json"]["schema"] = {"$ref": REFERENCE.format(model=ErrorBody.__name__)}
    return response
