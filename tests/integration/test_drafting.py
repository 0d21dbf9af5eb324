"""Drafting happens, for every request by itself: over HTTP, with the bundled pair.

A lossless test passes when nothing is drafted, so these ask for a floor: the share of a text that drafts wrote.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.setting_groups import BUNDLED_MODELS
from tests.integration.api_server import embedded_app, post, serving

PROMPTS = (
    "def read_lines(path):\n    with open(path) as file:\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items",
    "import os\n\ndef walk(root):\n    for name in sorted(os.listdir(root)):\n",
)
LONG_PROMPT = "\n".join(f"def function_{i}(a, b):\n    return a * {i} + b\n" for i in range(45))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    models = BUNDLED_MODELS / "target", BUNDLED_MODELS / "drafter"
    with serving(embedded_app(*models, **{"audit.fraction": 0.0})) as url:
        yield url


def complete(url: str, prompt: str, max_tokens: int = 300, **fields: Any) -> Mapping[str, Any]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "seed": 1, "ignore_eos": True, **fields}
    return post(url, model="tiny", **body)


def drafted_share(answer: Mapping[str, Any]) -> float:
    """Share of the output's tokens that were drafted and accepted: 0 for plain decoding."""
    accepted: int = answer["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]
    return accepted / float(answer["usage"]["completion_tokens"])


@pytest.mark.parametrize(("temperature", "floor"), [(0, 0.7), (0.5, 0.45)])
def test_drafting_happens(url: str, temperature: float, floor: float) -> None:
    shares = [drafted_share(complete(url, prompt, temperature=temperature)) for prompt in PROMPTS]
    assert sum(shares) / len(shares) > floor


@pytest.mark.parametrize("other", [{"policy": "fixed"}, {"policy": "paper"}, {"enabled": False}])
def test_what_one_request_asks_for_does_not_turn_off_anothers_drafts(url: str, other: Mapping[str, Any]) -> None:
    alone = drafted_share(complete(url, PROMPTS[0], 400))
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(complete, url, PROMPTS[1], 400, speculative=other)
        adaptive = pool.submit(complete, url, PROMPTS[0], 400)
        assert drafted_share(adaptive.result()) > 0.8 * alone
        beside.result()


def test_requests_of_all_policies_draft_in_one_batch_as_they_would_alone(url: str) -> None:
    kinds: dict[str, Mapping[str, Any]] = {
        "goodput": {},
        "fixed": {"policy": "fixed"},
        "paper": {"policy": "paper"},
        "plain": {"enabled": False},
    }
    alone = {kind: complete(url, PROMPTS[0], speculative=fields) for kind, fields in kinds.items()}
    with ThreadPoolExecutor(len(kinds)) as pool:
        waiting = {kind: pool.submit(complete, url, PROMPTS[0], speculative=fields) for kind, fields in kinds.items()}
        together = {kind: answer.result() for kind, answer in waiting.items()}
    for kind in kinds:
        assert together[kind]["choices"][0]["text"] == alone["plain"]["choices"][0]["text"], kind
        assert drafted_share(together[kind]) == pytest.approx(drafted_share(alone[kind]), abs=0.2), kind
    assert drafted_share(together["plain"]) == 0.0


def test_drafting_goes_on_beside_the_reading_of_long_prompts(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(complete, url, f"# {i}\n{LONG_PROMPT}", 1) for i in range(40)]
        shares = [drafted_share(complete(url, prompt)) for prompt in PROMPTS]
        for answer in reading:
            answer.result()
    assert sum(shares) / len(shares) > 0.6
