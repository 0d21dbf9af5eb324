"""Logs: one line per request, as text or as JSON. Prompts and outputs are never logged."""

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from service.engine.base import SpeculationStats

requests_log = logging.getLogger("service.requests")

_QUIET_PATHS = frozenset({"/health", "/ready", "/startup", "/metrics"})


@dataclass(slots=True)
class RequestRecord:
    """Facts about one HTTP request, complete when it has ended."""

    request_id: str
    method: str
    path: str
    key: str | None = None  # name of the API key
    status: int = 0
    seconds: float = 0.0
    sequences: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    speculation: SpeculationStats | None = None
    is_cancelled: bool = False  # the client went away
    error: str | None = None  # code or type of the error that it was answered with

    def fields(self) -> dict[str, Any]:
        """Return the fields to log, without those that don't apply."""
        found: dict[str, Any] = {
            "request": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.key is not None:
            found["key"] = self.key
        if self.sequences:
            found |= {
                "sequences": self.sequences,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
                "finish": ",".join(sorted(set(self.finish_reasons))),
            }
        if self.queue_seconds is not None:
            found["queue_seconds"] = round(self.queue_seconds, 4)
        if self.first_token_seconds is not None:
            found["first_token_seconds"] = round(self.first_token_seconds, 4)
        if self.speculation is not None and self.speculation.num_draft_tokens:
            drafted, accepted = self.speculation.num_draft_tokens, self.speculation.num_accepted_draft_tokens
            found |= {"drafted": drafted, "accepted": accepted, "acceptance_rate": round(accepted / drafted, 3)}
        if self.is_cancelled:
            found["cancelled"] = True
        if self.error is not None:
            found["error"] = self.error
        return found


def log_request(record: RequestRecord) -> None:
    """Write the request's line. Successful probes are left out: they come every second."""
    is_failure = record.status >= 500 and record.status != 503
    if record.path in _QUIET_PATHS and not is_failure:
        return
    fields = record.fields()
    level = logging.ERROR if is_failure else logging.INFO
    requests_log.log(level, "%s", " ".join(f"{key}={value}" for key, value in fields.items()), extra={"fields": fields})


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """Formats every line as a JSON object, with the fields of a request line as members."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= fields
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(style: Literal["text", "json"], level: str) -> None:
    """Send this process's logs to stderr; of other libraries, only warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(logging.WARNING, getattr(logging, level.upper())))
    for package in ("service", "drafters", "verifiers", "transformer"):
        logging.getLogger(package).setLevel(level.upper())
