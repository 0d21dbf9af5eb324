"""Checks after a soak. Each yields its complaints."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.e2e.soak.bodies import Body
from tests.e2e.soak.clients import TIMEOUT_SECONDS, Answer, Seen, parse_whole
from tests.e2e.soak.server import Server

AUDITS_SECONDS = 60  # for audits to end, which count as running requests
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def references(url: str, bodies: Sequence[Body]) -> list[Answer]:
    """Return plain decoding's answer to every body."""

    def ask(body: Body) -> Answer:
        fields = body.fields | {"speculative": {"enabled": False}}
        answer = httpx.post(url + body.path, json=fields, timeout=TIMEOUT_SECONDS)
        assert answer.status_code == 200, answer.text
        return parse_whole(answer.json())

    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(ask, bodies))


def wrong_outputs(seen: Sequence[Seen], bodies: Sequence[Body], expected: Sequence[Answer]) -> Iterator[str]:
    """Yield the answers that differ from plain decoding's."""
    right = {id(body): answer for body, answer in zip(bodies, expected, strict=True)}
    for one in seen:
        if one.answer is not None and one.body is not None and one.answer != right[id(one.body)]:
            yield f"{one.request_id} ({one.body.name}): {one.answer} instead of {right[id(one.body)]}"


def unreconciled(seen: Sequence[Seen], server: Server, counts_by_service: bool) -> Iterator[str]:
    """Yield where clients, log and counters disagree.

    counts_by_service: False with vLLM, whose counters include audits and steps for requests that had left.
    """
    samples = server.samples()
    lines = {line["request"]: line for line in server.log_lines() if "request" in line}
    for one in seen:
        line = lines.get(one.request_id)
        if line is None:
            if one.status is not None:  # a request whose client left at once may never have arrived
                yield f"{one.request_id}: status {one.status}, but no line in the log"
        elif one.status is not None and line["status"] != one.status:
            yield f"{one.request_id}: the client saw {one.status}, the log says {line['status']}"
        elif one.status is None and line["status"] not in (200, 429, 499, 503):
            yield f"{one.request_id}: its client left, but the log says {line['status']}"
        elif one.answer is not None and line["completion_tokens"] != one.answer.num_tokens:
            yield f"{one.request_id}: {one.answer.num_tokens} tokens, but the log says {line['completion_tokens']}"
    logged = Counter(line["status"] for line in lines.values())
    counted: Counter[int] = Counter()
    for name, labels, value in samples:
        if name == "diffuspec_http_responses_total" and labels["route"] not in ("/metrics", "/ready", "/health"):
            counted[int(labels["status"])] += int(value)
    if counted != logged:
        yield f"responses by status: {dict(counted)} counted, {dict(logged)} logged"
    for counter, field in (
        ("vllm:generation_tokens_total", "completion_tokens"),
        ("vllm:request_success_total", "sequences"),
    ):
        total, by_log = server.metric(counter), sum(line.get(field, 0) for line in lines.values())
        if counts_by_service and total != by_log:
            yield f"{counter}: {total:g}, but the log says {by_log}"
    deadline = time.monotonic() + AUDITS_SECONDS
    while any(server.metric(name) for name in GAUGES) and time.monotonic() < deadline:
        time.sleep(0.2)
    for name in GAUGES:
        if server.metric(name) != 0:
            yield f"{name}: {server.metric(name):g}, but no client is left"
