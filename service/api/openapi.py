"""The API's description: bodies are read by hand, for their limits and errors, so their schemas are added by hand."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api import schemas
from service.api.auth import OPEN_PATHS
from service.api.responses import ErrorBody

DESCRIPTION = """OpenAI-compatible completions by lossless speculative decoding: a diffusion language model drafts, the
target model verifies, and the text is the one that the target alone would have written."""
REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.CompletionRequest,
    schemas.ChatCompletionRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
)
REFERENCE = "#/components/schemas/{model}"
MEANINGS = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    429: "The queue is full; `Retry-After` says when to come again.",
    503: "Not ready: loading, draining, hung or dead.",
}


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """What a route says of its body."""
    reference = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def answers(model: Any, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers; 400 comes with every route that takes a body, which 415 tells."""
    codes = {*statuses, 400} if 415 in statuses else set(statuses)
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorBody, "description": MEANINGS[code]} for code in sorted(codes)
    }
    return {200: {"model": model, "description": "Done."}, **errors}


def install_openapi(app: FastAPI, *, is_secured: bool) -> None:
    """Replace the generated description by one with request bodies, and with keys where they are asked for."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, is_secured=is_secured)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way


def _describe(app: FastAPI, *, is_secured: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    _, definitions = models_json_schema([(model, "validation") for model in REQUESTS], ref_template=REFERENCE)
    document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
    if is_secured:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            if path not in OPEN_PATHS:
                for operation in methods.values():
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = {
                        "description": MEANINGS[401],
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
                    }
    return document
