"""All errors that a client can get, as one tree, in OpenAI's shape.

ApiError
├── InvalidRequestError     400
├── AuthenticationError     401
├── NotFoundError           404
├── MethodNotAllowedError   405
├── BodyTimeoutError        408
├── BodyTooLargeError       413
├── UnsupportedMediaError   415
├── TooManyRequestsError    429
├── InternalError           500
├── NotReadyError           503
└── RequestTimeoutError     504
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from service.engine import base as engine
from service.engine.base import EngineError, EngineUnavailableError, QueueFullError


class ApiError(Exception):
    """An error with an HTTP status. The client sees its message, so the message never holds paths or addresses."""

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body, `{"error": {"message", "type", "param", "code"}}`; in a stream it is a frame."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ApiError):
    status = 400
    type = "invalid_request_error"


class AuthenticationError(ApiError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(ApiError):
    status = 404
    type = "not_found_error"


class MethodNotAllowedError(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTimeoutError(ApiError):
    status = 408
    type = "invalid_request_error"
    code = "body_timeout"


class BodyTooLargeError(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaError(ApiError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class TooManyRequestsError(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class InternalError(ApiError):
    code = "internal_error"

    def __init__(self, message: str = "The server failed on this request; its log says why.") -> None:
        super().__init__(message)


class NotReadyError(ApiError):
    status = 503
    type = "service_unavailable_error"
    code = "not_ready"


class RequestTimeoutError(ApiError):
    status = 504
    type = "timeout_error"
    code = "request_timeout"


def refuse(message: str, *, param: str, code: str = "invalid_value") -> NoReturn:
    """Raise the InvalidRequestError that names `param`, the field that is wrong."""
    raise InvalidRequestError(message, param=param, code=code)


def from_engine(error: EngineError) -> ApiError:
    """Translate an error of the engine into the one that the client gets."""
    if isinstance(error, QueueFullError):
        seconds = str(max(1, math.ceil(error.retry_after_seconds)))
        return TooManyRequestsError(str(error), headers={"Retry-After": seconds})
    if isinstance(error, engine.RequestRefusedError):
        return InvalidRequestError(str(error), code="invalid_value")
    if isinstance(error, EngineUnavailableError):
        return NotReadyError(str(error), headers={"Retry-After": "1"})
    if isinstance(error, engine.RequestTimeoutError):
        return RequestTimeoutError(str(error))
    if isinstance(error, engine.NoTokenLeftError):
        return InvalidRequestError(
            f"{error} Allow more: change allowed_token_ids, bad_words, min_tokens, stop_token_ids or the structure.",
            code="no_token_left",
        )
    return InternalError()


def from_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """Make the error for a status that the web framework raised by itself: no such route, no such method."""
    if status == 404:
        return NotFoundError("No such route; /docs lists what there is.", code="unknown_route")
    if status == 405:
        return MethodNotAllowedError("This route does not take this method.", headers=headers)
    error: ApiError = InvalidRequestError(detail, headers=headers) if status < 500 else InternalError()
    error.status = status
    return error
