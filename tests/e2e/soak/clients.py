"""Clients that behave in many ways, and a record of what each of them saw."""

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.soak.bodies import INVALID, Body
from tests.integration.raw_client import begin, hang_up

MANNERS = {"whole": 8, "stream": 8, "slow": 2, "leave": 4, "abort": 2, "unread": 1, "invalid": 4}
REFUSALS = (429, 503)  # the server sheds load or hangs; the client pauses before its next request
TIMEOUT_SECONDS = 180


@dataclass(frozen=True)
class Answer:
    """The choices of an answer by index: text, token ids, finish reason."""

    choices: tuple[tuple[str, tuple[int, ...], str], ...]
    num_tokens: int  # by `usage`


@dataclass
class Seen:
    """One request as its client saw it."""

    request_id: str
    path: str
    body: Body | None
    status: int | None = None  # None: the client left before it saw one
    answer: Answer | None = None  # None: the request was refused, or its client left


@dataclass
class Traffic:
    """Threads that send requests until they are told to stop. `complaints`: what no client should ever see."""

    url: str
    bodies: list[Body]
    seed: int
    seen: list[Seen] = field(default_factory=list)
    manners: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, num_clients: int) -> None:
        for number in range(num_clients):
            noise = random.Random(f"{self.seed}-{number}")
            thread = threading.Thread(target=self._send_on, args=(noise, number), daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()

    def _send_on(self, noise: random.Random, number: int) -> None:
        count = 0
        with httpx.Client(base_url=self.url, timeout=TIMEOUT_SECONDS) as http:
            while not self.stop.is_set():
                count += 1
                manner = noise.choices(list(MANNERS), list(MANNERS.values()))[0]
                self.send(http, manner, f"soak-{number}-{count}", noise)

    def send(self, http: httpx.Client, manner: str, request_id: str, noise: random.Random) -> None:
        body = noise.choice(self.bodies)
        seen = Seen(request_id, body.path, body)
        try:
            if manner == "invalid":
                self._send_invalid(http, seen, noise)
            elif manner in ("whole", "stream"):
                self._send(http, seen, body, is_stream=manner == "stream")
            else:
                self._misbehave(seen, body, manner, noise)
        except Exception as error:
            self._complain(f"{request_id} ({manner}, {body.name}): {error!r}")
            if isinstance(error, httpx.TransportError | OSError):
                self.stop.wait(1.0)
        with self._lock:
            self.seen.append(seen)
            self.manners[manner] += 1
        if seen.status in REFUSALS:
            self.stop.wait(1.0)

    def _complain(self, what: str) -> None:
        with self._lock:
            self.complaints.append(what)

    def _send(self, http: httpx.Client, seen: Seen, body: Body, is_stream: bool) -> None:
        headers = {"x-request-id": seen.request_id}
        if not is_stream:
            answer = http.post(body.path, json=body.fields, headers=headers)
            seen.status = answer.status_code
            if answer.status_code == 200:
                seen.answer = parse_whole(answer.json())
        else:
            fields = streamed(body)
            with http.stream("POST", body.path, json=fields, headers=headers) as stream:
                seen.status = stream.status_code
                content = stream.read()
            if seen.status == 200:
                seen.answer = parse_stream(content)
        if seen.status != 200 and seen.status not in REFUSALS:
            self._complain(f"{seen.request_id} ({body.name}): status {seen.status}")

    def _send_invalid(self, http: httpx.Client, seen: Seen, noise: random.Random) -> None:
        path, fields, status = noise.choice(INVALID)
        seen.path, seen.body = path, None
        content = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        headers = {"x-request-id": seen.request_id, "content-type": "application/json"}
        answer = http.post(path, content=content, headers=headers)
        seen.status = answer.status_code
        if seen.status not in (status, *REFUSALS):
            self._complain(f"{seen.request_id} (invalid): status {seen.status} instead of {status}: {fields!r}")

    def _misbehave(self, seen: Seen, body: Body, manner: str, noise: random.Random) -> None:
        buffer_bytes = 16384 if manner in ("slow", "unread") else None
        fields = body.fields if manner == "abort" and noise.random() < 0.5 else streamed(body)
        with begin(
            self.url, fields, body.path, buffer_bytes, {"x-request-id": seen.request_id, "connection": "close"}
        ) as client:
            client.settimeout(TIMEOUT_SECONDS)
            if manner == "abort":
                time.sleep(noise.random() * 0.5)
            elif manner == "unread":
                self.stop.wait(10)
            elif manner == "leave":
                for _ in range(noise.randrange(1, 8)):
                    if not client.recv(256):
                        break
            else:
                received = b""
                while piece := client.recv(512):
                    received += piece
                    time.sleep(0.01)
                head, _, content = received.partition(b"\r\n\r\n")
                seen.status = int(head.split()[1])
                if seen.status == 200:
                    seen.answer = parse_stream(unchunked(content))
                return
            hang_up(client, politely=noise.random() < 0.5)


def streamed(body: Body) -> dict[str, Any]:
    return body.fields | {"stream": True, "stream_options": {"include_usage": True}}


def unchunked(content: bytes) -> bytes:
    """Decode a body from HTTP's chunked coding."""
    whole = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        whole, content = whole + content[:length], content[length + 2 :]
    return whole


def parse_whole(content: dict[str, Any]) -> Answer:
    choices = sorted(content["choices"], key=lambda choice: choice["index"])
    return Answer(
        tuple((_text(choice), tuple(choice["token_ids"]), choice["finish_reason"]) for choice in choices),
        content["usage"]["completion_tokens"],
    )


def parse_stream(content: bytes) -> Answer:
    """Parse a streamed answer. Raises ValueError if the stream is cut short."""
    lines = [line.removeprefix("data: ") for line in content.decode().split("\n\n") if line]
    if not lines or lines[-1] != "[DONE]":
        raise ValueError(f"the stream ends with {lines[-1:]}")
    texts: dict[int, str] = {}
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    num_tokens = -1
    for line in lines[:-1]:
        chunk = json.loads(line)
        if chunk.get("usage"):
            num_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + _text(choice)
            tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
            reasons[index] = choice.get("finish_reason") or reasons.get(index, "")
    return Answer(tuple((texts[i], tuple(tokens[i]), reasons[i]) for i in sorted(texts)), num_tokens)


def _text(choice: dict[str, Any]) -> str:
    """Return the text with the names and arguments of calls, which join to the same however they are cut."""
    message = choice.get("message") or choice.get("delta") or {}
    text: str = choice.get("text", message.get("content")) or ""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return text + "".join(call.get("name", "") + call["arguments"] for call in calls)
