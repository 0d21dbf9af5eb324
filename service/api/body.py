"""Reads a request's JSON body: bounded in bytes, time and depth, strict in types, with errors that name the field."""

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import pydantic_core
from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from service.api.fields import RequestModel
from service.api.serving import ServedModel, Serving
from service.errors import BodyTimeoutError, BodyTooLargeError, InvalidRequestError, UnsupportedMediaError, refuse
from service.keys import Key
from service.logs import RequestRecord
from service.setting_groups import LimitSettings

MAX_DROPPED_BYTES = 64 << 20

Fields = TypeVar("Fields", bound=RequestModel)


class ClientDisconnectedError(Exception):
    """The client has gone: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Call(Generic[Fields]):
    """A request whose body is valid, and the model that it asks for."""

    request: Request
    serving: Serving
    fields: Fields
    model: ServedModel
    id: str  # of the answer
    created: int  # Unix time

    @property
    def limits(self) -> LimitSettings:
        return self.serving.settings.limits

    @property
    def key(self) -> Key | None:
        """The API key that the request came with; None where the server asks for none."""
        key: Key | None = self.request.state.key
        return key

    @property
    def record(self) -> RequestRecord:
        """The request's line in the log, as far as it is known."""
        record: RequestRecord = self.request.state.record
        return record


async def receive(request: Request, fields_type: type[Fields], id_prefix: str = "") -> Call[Fields]:
    """Read the body and find the model. Raises an ApiError, or ClientDisconnectedError."""
    serving: Serving = request.app.state.serving
    server = serving.settings.server
    fields = await read_body(request, fields_type, server.max_body_bytes, server.body_seconds)
    model = serving.model(getattr(fields, "model", None))
    return Call(request, serving, fields, model, f"{id_prefix}-{uuid.uuid4().hex}", int(serving.now()))


async def read_body(request: Request, fields_type: type[Fields], max_bytes: int, timeout_seconds: float) -> Fields:
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
    return validate(parse_json(data), fields_type)


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    """Return the body if it is not too large.

    Reads on for a while when it is, and drops what comes: a client that is cut off while it sends would not see the
    answer.
    """
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


def validate(content: Any, fields_type: type[Fields]) -> Fields:
    """Check parsed JSON against a request model. Raises InvalidRequestError naming the first wrong field."""
    if not isinstance(content, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    try:
        return fields_type.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        # An unknown field first: it is often the mistyped name of one that is then reported as missing.
        _refuse(next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0]))


def _refuse(problem: Any) -> NoReturn:
    name = _field_name(problem["loc"])
    if problem["type"] == "extra_forbidden":
        refuse(f"Unknown field: {name}.", param=name, code="unknown_field")
    if problem["type"] == "missing":
        refuse(f"{name} is required.", param=name, code="missing_field")
    message: str = problem["msg"]
    if problem["type"] == "model_type":  # its own message names a class of this package
        message = "must be an object"
    refuse(f"{name}: {message[0].lower()}{message[1:]}.", param=name)


def _field_name(location: tuple[str | int, ...]) -> str:
    name = ""
    for key in location:
        name += f"[{key}]" if isinstance(key, int) else f".{key}" if name else str(key)
    return name[:200]
