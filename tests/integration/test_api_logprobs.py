"""Log probabilities and echoes, in both formats, against the model itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.api_server import post

PROMPT = "def f(x):\n    return f(x) + f(x) + "


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_logprobs_of_a_completion_match_its_text(url: str) -> None:
    answer = post(url, prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3, return_token_ids=True)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())  # greedy
        assert len(top) == 3
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_echo_scores_the_prompt_as_the_harness_wants_it(url: str) -> None:
    whole = PROMPT + "é "
    answer = post(url, prompt=whole, max_tokens=1, temperature=0, logprobs=1, echo=True, ignore_eos=True)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(whole)
    assert len(logprobs["tokens"]) == len(whole.encode()) + 1
    assert logprobs["token_logprobs"][0] is None
    assert all(logprob < 0 for logprob in logprobs["token_logprobs"][1:])
    assert all(token in top for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True))
    assert logprobs["text_offset"][: len(PROMPT)] == list(range(len(PROMPT)))
    assert logprobs["tokens"][len(PROMPT) : len(PROMPT) + 2] == ["bytes:\\xc3", "bytes:\\xa9"]
    # A second request finds the prompt cached; its scores must not suffer.
    again = post(url, prompt=whole, max_tokens=1, temperature=0, logprobs=1, echo=True, ignore_eos=True)
    scores = again["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[1:] == pytest.approx(logprobs["token_logprobs"][1:], rel=1e-4)


def test_the_prompts_scores_are_those_of_the_model(url: str, served_target: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    tokens = list(PROMPT.encode())
    model = LlamaForCausalLM.from_pretrained(served_target).eval()
    with torch.inference_mode():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [float(scores[position, token]) for position, token in enumerate(tokens[1:])]
    answer = post(url, prompt=tokens, max_tokens=0, logprobs=0, echo=True)
    choice = answer["choices"][0]
    assert choice["text"] == PROMPT
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    assert answer["usage"]["completion_tokens"] == 0


def test_streamed_echo_and_logprobs_are_the_whole_ones(url: str, reproducible: dict[str, Any]) -> None:
    body = {"prompt": "é" + PROMPT, "max_tokens": 8, "seed": 1, "logprobs": 2, "echo": True, "return_token_ids": True}
    body |= reproducible
    whole = post(url, **body)["choices"][0]
    text, tokens, offsets, ids = "", [], [], []
    with httpx.stream("POST", url + "/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"]
                tokens += choice["logprobs"]["tokens"]
                offsets += choice["logprobs"]["text_offset"]
                ids += choice["token_ids"]
    assert text == whole["text"]
    assert tokens == whole["logprobs"]["tokens"]
    assert offsets == whole["logprobs"]["text_offset"]
    assert ids == whole["token_ids"]


def test_chat_logprobs_have_bytes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=6, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    data = bytes(byte for entry in logprobs.content for byte in entry.bytes or ())
    assert data.decode("utf-8", "replace").replace("<|endoftext|>", "") == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
