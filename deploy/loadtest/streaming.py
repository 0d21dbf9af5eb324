"""Read one streamed answer of an OpenAI-compatible server, and time its chunks."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

Clock = Callable[[], float]


class Answer(Protocol):
    """The attributes that we use of a response from `requests`."""

    status_code: int
    text: str

    def iter_content(self, chunk_size: int | None = ...) -> Iterable[bytes]: ...
    def close(self) -> None: ...


class RefusedError(Exception):
    """The server answered with a status other than 200, or with an error in the stream."""


class CutShortError(Exception):
    """The stream ended without `data: [DONE]`."""


@dataclass
class Timing:
    """Durations of one request, in seconds."""

    first_token: float | None = None  # from sending the request
    between_tokens: list[float] = field(default_factory=list)  # per chunk after the first: its wait / its tokens
    total: float = 0.0
    num_tokens: int = 0


def read_stream(answer: Answer, started: float, clock: Clock, stop_after_tokens: int | None = None) -> Timing:
    """Read an answer to `{"stream": true, "return_token_ids": true}`. Only the ids tell how many tokens a chunk has.

    After `stop_after_tokens` close the connection, like a user who walks away. Raises RefusedError and
    CutShortError.
    """
    timing = Timing()
    try:
        if answer.status_code != 200:
            raise RefusedError(f"{answer.status_code}: {_code(answer.text)}")
        last = started
        for event in events(answer.iter_content(chunk_size=None)):
            if event == "[DONE]":
                return timing
            chunk = json.loads(event)
            if "error" in chunk:
                raise RefusedError(f"in the stream: {chunk['error'].get('code') or chunk['error'].get('type')}")
            new = sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])
            if not new:
                continue
            timing.num_tokens += new
            now = clock()
            if timing.first_token is None:
                timing.first_token = now - started
            else:
                timing.between_tokens.append((now - last) / new)
            last = now
            if stop_after_tokens is not None and timing.num_tokens >= stop_after_tokens:
                return timing
        raise CutShortError("the stream ended before [DONE]")
    finally:
        answer.close()
        timing.total = clock() - started


def events(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield the data of server-sent events, however the bytes are cut."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def _code(text: str) -> str:
    try:
        error: dict[str, Any] = json.loads(text)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "not an OpenAI error"


monotonic: Clock = time.perf_counter
