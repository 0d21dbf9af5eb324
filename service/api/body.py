"""Reading a request's JSON body: bounded in bytes, time and depth, strict in types, errors that name the field."""

import asyncio
from typing import Any, TypeVar

import pydantic_core
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from service.errors import BodyTimeoutError, BodyTooLargeError, InvalidRequestError, UnsupportedMediaError

MAX_DROPPED_BYTES = 64 << 20

Body = TypeVar("Body", bound=BaseModel)


class ClientDisconnectedError(Exception):
    """Nobody is left to answer."""


async def read_body(request: Request, model: type[Body], max_bytes: int, timeout_seconds: float) -> Body:
    """Read and validate the body. Raises an ApiError with status 400, 408, 413 or 415, or ClientDisconnectedError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaError("Send the body as JSON with the header Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaError("Compressed bodies are not supported; send the JSON as it is.")
    try:
        async with asyncio.timeout(timeout_seconds):
            data = await _read_bytes(request, max_bytes)
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {timeout_seconds:g} seconds.") from None
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    return validate(parse_json(data), model)


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    """The body, if it is not too large. What is too large is read on and dropped for a while: a client that is cut off
    while it sends would not see the answer."""
    declared = request.headers.get("content-length", "")
    total = int(declared[:20]) if declared.isascii() and declared.isdigit() else 0
    data = bytearray()
    if total <= max_bytes + MAX_DROPPED_BYTES:
        total = 0
        async for piece in request.stream():
            total += len(piece)
            if total <= max_bytes:
                data += piece
            elif total > max_bytes + MAX_DROPPED_BYTES:
                break
    if total > max_bytes:
        cut = {"Connection": "close"} if total > max_bytes + MAX_DROPPED_BYTES else None
        raise BodyTooLargeError(f"The body is larger than the {max_bytes} bytes that this server takes.", headers=cut)
    return bytes(data)


def parse_json(data: bytes) -> Any:
    """Parse strictly: no NaN, no lone surrogates, UTF-8 only, nesting bounded. Raises InvalidRequestError."""
    try:
        return pydantic_core.from_json(data, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def validate(content: Any, model: type[Body]) -> Body:
    """Check parsed JSON against a request model. Raises InvalidRequestError naming the first wrong field."""
    if not isinstance(content, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # An unknown field first: it is often the mistyped name of one that is then reported as missing.
        problems = sorted(error.errors(include_url=False, include_input=False), key=_is_not_unknown)
        raise _refusal(problems[0]) from None


def _is_not_unknown(problem: Any) -> bool:
    return problem["type"] != "extra_forbidden"  # type: ignore[no-any-return]


def _refusal(problem: Any) -> InvalidRequestError:
    name = _field_name(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(f"Unknown field: {name}.", param=name, code="unknown_field")
    if problem["type"] == "missing":
        return InvalidRequestError(f"{name} is required.", param=name, code="missing_field")
    if problem["type"] == "model_type":  # its own message names a class of ours
        return InvalidRequestError(f"{name}: must be an object.", param=name, code="invalid_value")
    message: str = problem["msg"]
    return InvalidRequestError(f"{name}: {message[0].lower()}{message[1:]}.", param=name, code="invalid_value")


def _field_name(location: tuple[str | int, ...]) -> str:
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name[:200]
