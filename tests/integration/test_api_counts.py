"""What is counted as drafted and accepted is the same in the answer, in its trace and in Prometheus."""

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.api_server import error_of, post

ALPHABET = "abcdef"
CYCLE = {
    "prompt": ALPHABET * 6,
    "max_tokens": 60,
    "temperature": 0,
    "allowed_token_ids": [ord(letter) for letter in ALPHABET],
    "logit_bias": {str(ord("a")): 100},
    "bad_words": [x + y for x in ALPHABET for y in ALPHABET if ALPHABET[(ALPHABET.index(x) + 1) % 6] != y],
    "return_token_ids": True,
    "speculative": {"trace": True, "policy": "fixed", "max_draft_tokens": 8},
}
"""Leaves any model nothing but abcdefabcdef..., which free drafts get right."""


def scrape(url: str) -> dict[str, float]:
    """Sums over labels, by name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(url + "/metrics").text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def accepted_by_prometheus(before: dict[str, float], after: dict[str, float]) -> list[float]:
    names = ("vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total")
    return [after[name] - before[name] for name in names]


def drafted_kinds(choice: dict[str, Any]) -> int:
    steps = choice["trace"]
    tokens = [token for step in steps for token in (*step["tokens"], *step.get("cut", ()))]
    return sum(token["kind"] == "drafted" for token in tokens)


def test_a_stop_token_in_a_draft_is_where_counting_ends(url: str) -> None:
    before = scrape(url)
    answer = post(url, **CYCLE, stop_token_ids=[ord("d")])
    choice, counts = answer["choices"][0], answer["metrics"]["speculative_decoding"]
    assert bytes(choice["token_ids"]) == b"abcd"
    last = choice["trace"][-1]
    assert [token["kind"] for token in last["tokens"]] == ["drafted"] * 3
    assert len(last["rejected"]) == 5
    assert drafted_kinds(choice) == counts["num_accepted_draft_tokens"] == 3
    assert counts["acceptance_histogram"] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert accepted_by_prometheus(before, scrape(url)) == [3, 3]


def test_what_a_stop_text_cuts_off_is_in_the_trace(url: str) -> None:
    before = scrape(url)
    answer = post(url, **CYCLE, stop=["d"])
    choice, counts = answer["choices"][0], answer["metrics"]["speculative_decoding"]
    assert (choice["text"], bytes(choice["token_ids"])) == ("abc", b"abcd")
    assert [token["text"] for token in choice["trace"][-1]["cut"]] == ["e", "f", "a", "b", "c", "d"]
    assert drafted_kinds(choice) == counts["num_accepted_draft_tokens"] == 8
    # The text is searched beside the engine, which may have taken further steps, of 8 each, before it is told to stop.
    accepted, by_position = accepted_by_prometheus(before, scrape(url))
    assert accepted == by_position >= 8
    assert accepted % 8 == 0


def test_every_kind_of_token_is_told_apart(url: str) -> None:
    choice = post(url, **CYCLE)["choices"][0]
    kinds = [[token["kind"] for token in step["tokens"]] for step in choice["trace"]]
    assert kinds[0] == ["plain"]
    assert kinds[1] == ["drafted"] * 8 + ["bonus"]
    wrong = CYCLE | {"prompt": "abcfed" * 6, "max_tokens": 12}  # what is copied is rejected
    steps = post(url, **wrong)["choices"][0]["trace"]
    replaced = [step["tokens"][-1]["kind"] for step in steps[:-1] if step["rejected"]]
    assert set(replaced) == {"recovered"}


@pytest.mark.parametrize("n", [1, 2])
def test_a_prompt_that_is_only_read_is_counted(url: str, engine: str, n: int) -> None:
    before = scrape(url)
    usage = post(url, prompt="only read", max_tokens=0, echo=True, logprobs=1, n=n)["usage"]
    after = scrape(url)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert usage["prompt_tokens"] == usage["total_tokens"] == len("only read")
    assert grown["vllm:prompt_tokens_total"] == n * len("only read")
    if engine == "embedded":  # vLLM always generates a token, and counts it
        assert grown["vllm:request_queue_time_seconds_count"] == n
        assert grown["vllm:generation_tokens_total"] == grown["vllm:time_to_first_token_seconds_count"] == 0


@pytest.mark.parametrize(
    "rules",
    [
        {"allowed_token_ids": [97], "bad_words": ["a"]},
        {"allowed_token_ids": [256], "min_tokens": 4},  # the end of the text
        {"allowed_token_ids": [260, 271]},  # rows of the logits that no token stands for
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_rules_that_ban_every_token_are_refused_before_the_first_byte(
    url: str, rules: dict[str, Any], stream: bool
) -> None:
    answer = httpx.post(url + "/v1/completions", json={"prompt": "x", "stream": stream, **rules}, timeout=120)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "no_token_left",
        "allowed_token_ids",
    )


def test_rules_that_ban_every_token_only_later_are_still_the_clients_error(url: str) -> None:
    body = {"prompt": "x", "allowed_token_ids": [97], "bad_words": ["aaa"], "max_tokens": 8}
    answer = httpx.post(url + "/v1/completions", json=body, timeout=120)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "no_token_left"
    assert "bad_words" in error_of(answer)["message"]
    streamed = httpx.post(url + "/v1/completions", json={**body, "stream": True}, timeout=120).text
    assert '"text":"a"' in streamed
    assert '"type":"invalid_request_error"' in streamed.splitlines()[-2]
    assert "[DONE]" not in streamed


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_fills_the_context_can_be_scored(url: str, stream: bool) -> None:
    body = {"prompt": "x" * 512, "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        assert (
            '"finish_reason":"length"'
            in httpx.post(url + "/v1/completions", json={**body, "stream": True}, timeout=120).text
        )
        return
    answer = post(url, **body)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 512
    assert answer["usage"]["completion_tokens"] == 0
    refused = httpx.post(url + "/v1/completions", json={**body, "max_tokens": 1}, timeout=120)
    assert error_of(refused)["code"] == "context_length_exceeded"
