"""What must hold after a soak; each check yields its complaints."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.e2e.soak.bodies import Body
from tests.e2e.soak.clients import TIMEOUT_SECONDS, Answer, Seen, parse_whole
from tests.e2e.soak.server import Server

GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def references(url: str, bodies: Sequence[Body]) -> list[Answer]:
    """What plain decoding answers."""

    def ask(body: Body) -> Answer:
        fields = body.fields | {"speculative": {"enabled": False}}
        answer = httpx.post(url + body.path, json=fields, timeout=TIMEOUT_SECONDS)
        assert answer.status_code == 200, answer.text
        return parse_whole(answer.json())

    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(ask, bodies))


def wrong_outputs(seen: Sequence[Seen], bodies: Sequence[Body], expected: Sequence[Answer]) -> Iterator[str]:
    """Answers that are not plain decoding's."""
    right = {id(body): answer for body, answer in zip(bodies, expected, strict=True)}
    for one in seen:
        if one.answer is not None and one.body is not None and one.answer != right[id(one.body)]:
            yield f"{one.request_id} ({one.body.name}): {one.answer} instead of {right[id(one.body)]}"


def unreconciled(seen: Sequence[Seen], server: Server, counts_by_service: bool) -> Iterator[str]:
    """Where clients, log and counters do not agree.

    counts_by_service: not so with vLLM, whose counters hold what its engine did, audits and steps for nobody included.
    """
    samples = server.samples()
    lines = {line["request"]: line for line in server.log_lines() if "request" in line}
    for one in seen:
        line = lines.get(one.request_id)
        if line is None:
            if one.status is not None:  # who left at once may never have been heard
                yield f"{one.request_id}: status {one.status}, but no line in the log"
        elif one.status is not None and line["status"] != one.status:
            yield f"{one.request_id}: the client saw {one.status}, the log says {line['status']}"
        elif one.status is None and line["status"] not in (200, 429, 499, 503):
            yield f"{one.request_id}: left by its client, status {line['status']}"
        elif one.answer is not None and line["completion_tokens"] != one.answer.num_tokens:
            yield f"{one.request_id}: {one.answer.num_tokens} tokens, {line['completion_tokens']} by the log"
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
        if total != by_log if counts_by_service else total < by_log:
            yield f"{counter}: {total:g}, by the log {by_log}"
    for name in GAUGES:
        if server.metric(name) != 0:
            yield f"{name}: {server.metric(name):g} with nobody there"
