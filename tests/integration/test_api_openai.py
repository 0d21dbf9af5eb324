"""The `openai` client, unchanged, against the real engine over tiny models."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.integration.api_server import post, wait_for

PROMPT = "def f(x):\n    return f(x) + f(x) + "


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert 1 <= answer.usage.completion_tokens <= 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_default_is_16_tokens_for_completions_and_the_context_for_chats(url: str) -> None:
    assert post(url, prompt=PROMPT, temperature=0, ignore_eos=True)["usage"]["completion_tokens"] == 16
    body = {"messages": [{"role": "user", "content": "x" * 480}], "temperature": 0, "ignore_eos": True}
    usage = post(url, "/v1/chat/completions", **body)["usage"]
    assert usage["total_tokens"] == 512


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_never_changes_the_text(client: openai.OpenAI, engine: str, temperature: float) -> None:
    if engine == "vllm" and temperature:
        pytest.skip("vLLM draws by itself: the distribution is the same, a seeded text is not")
    texts, drafted = [], []
    for speculative in ({}, {"enabled": False}, {"policy": "fixed", "max_draft_tokens": 8}, {"policy": "paper"}):
        answer = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=48,
            temperature=temperature,
            seed=11,
            extra_body={"speculative": speculative, "return_token_ids": True, "ignore_eos": True},
        )
        texts.append(answer.choices[0].token_ids)  # type: ignore[attr-defined]
        drafted.append(answer.metrics["speculative_decoding"]["num_draft_tokens"])  # type: ignore[attr-defined]
    assert texts[1:] == texts[:1] * 3
    assert drafted[1] == 0
    assert drafted[2] > 0


@pytest.mark.parametrize("stop", [None, ["n"]])
def test_a_stream_is_the_whole_answer_in_pieces(
    client: openai.OpenAI, stop: list[str] | None, reproducible: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 3, "stop": stop}
    options["extra_body"] = reproducible
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert all(chunk.usage is None for chunk in pieces)
    assert last.choices == []
    assert last.usage == whole.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})
    assert len({chunk.id for chunk in chunks}) == 1


async def test_async_streams_run_side_by_side(url: str, reproducible: dict[str, Any]) -> None:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:

        async def text(seed: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=32, seed=seed, stream=True, extra_body=reproducible
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(text(seed) for seed in range(6)))
        alone = [await text(seed) for seed in range(6)]
    assert together == alone


def test_chats(client: openai.OpenAI, reproducible: dict[str, Any]) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 24, "seed": 5, "extra_body": reproducible}
    whole = client.chat.completions.create(messages=messages, **options)
    chunks = list(client.chat.completions.create(messages=messages, **options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    history = [*messages, whole.choices[0].message, {"role": "user", "content": "more"}]
    again = client.chat.completions.create(model="tiny", messages=history, max_completion_tokens=4)
    assert again.usage is not None
    assert again.usage.completion_tokens <= 4


def test_choice_zero_of_n_is_the_single_choice_and_choice_i_has_seed_plus_i(
    client: openai.OpenAI, reproducible: dict[str, Any]
) -> None:
    def texts(seed: int, n: int) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, seed=seed, n=n, extra_body=reproducible
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.text for choice in answer.choices]

    assert texts(7, 3) == [*texts(7, 1), *texts(8, 1), *texts(9, 1)]


def test_several_prompts_in_every_shape(url: str) -> None:
    first, second = "ab ab ab", "xyz"
    single = [post(url, prompt=prompt, temperature=0)["choices"][0]["text"] for prompt in (first, second)]
    shapes: list[Any] = [[first, second], [list(first.encode()), list(second.encode())]]
    for prompt in shapes:
        answer = post(url, prompt=prompt, temperature=0, n=2)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in answer["choices"]] == [single[0]] * 2 + [single[1]] * 2
        assert answer["usage"]["prompt_tokens"] == len(first) + len(second)
    assert post(url, prompt=list(first.encode()), temperature=0)["choices"][0]["text"] == single[0]


def test_stop_strings_cut_the_text_and_only_it(url: str) -> None:
    full = post(url, prompt=PROMPT, max_tokens=60, temperature=0, ignore_eos=True)["choices"][0]["text"]
    place = 20
    stop = full[place : place + 3]
    first = full.index(stop)
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stop": ["never seen", stop]}
    answer = post(url, **body)
    choice = answer["choices"][0]
    assert choice["text"] == full[:first]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert answer["usage"]["completion_tokens"] < 60
    assert post(url, **body, include_stop_str_in_output=True)["choices"][0]["text"] == full[: first + len(stop)]


def test_stop_tokens_end_the_text(url: str) -> None:
    ids = post(url, prompt=PROMPT, max_tokens=30, temperature=0, ignore_eos=True, return_token_ids=True)["choices"][0][
        "token_ids"
    ]
    stop = ids[10]
    answer = post(
        url, prompt=PROMPT, max_tokens=30, temperature=0, ignore_eos=True, return_token_ids=True, stop_token_ids=[stop]
    )
    choice = answer["choices"][0]
    assert choice["token_ids"] == ids[: ids.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_repeated_prompts_report_cached_tokens(url: str) -> None:
    prompt = "cached " * 20
    post(url, prompt=prompt)
    assert post(url, prompt=prompt)["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_traces_account_for_every_token(url: str) -> None:
    speculative = {"trace": True, "policy": "fixed", "max_draft_tokens": 6}
    answer = post(url, prompt="ab" * 40, max_tokens=40, temperature=0, speculative=speculative, return_token_ids=True)
    choice, counts = answer["choices"][0], answer["metrics"]["speculative_decoding"]
    steps = choice["trace"]
    assert [token["token_id"] for step in steps for token in step["tokens"]] == choice["token_ids"]
    drafting = [step for step in steps if step["source"] != "none"]
    for step in steps[:-1]:
        *drafted, last = [token["kind"] for token in step["tokens"]]
        assert set(drafted) <= {"drafted"}
        assert last == ("plain" if step not in drafting else "recovered" if step["rejected"] else "bonus")
    assert steps[0]["tokens"][-1]["kind"] == "plain"  # the prompt's own step drafts nothing
    assert len(drafting) == counts["num_spec_steps"] > 0
    assert counts["num_spec_tokens"] == 6
    assert sum(counts["acceptance_histogram"]) == counts["num_spec_steps"]
    assert len(counts["acceptance_histogram"]) == 7
    weighted = sum(accepted * count for accepted, count in enumerate(counts["acceptance_histogram"]))
    assert weighted == counts["num_accepted_draft_tokens"]
    assert counts["mean_acceptance_length"] == pytest.approx(1 + weighted / counts["num_spec_steps"])


def test_without_speculation_the_counts_are_zero(url: str) -> None:
    answer = post(url, prompt=PROMPT, speculative={"enabled": False})
    counts = answer["metrics"]["speculative_decoding"]
    assert set(counts) == {
        "num_spec_steps",
        "num_spec_tokens",
        "num_draft_tokens",
        "num_accepted_draft_tokens",
        "mean_acceptance_length",
        "draft_acceptance_rate",
        "acceptance_histogram",
    }
    assert sum(counts["acceptance_histogram"]) == 0
    assert counts["num_draft_tokens"] == counts["draft_acceptance_rate"] == 0


def test_truncation_keeps_the_end(url: str) -> None:
    answer = post(url, prompt="x" * 600 + "abc", truncate_prompt_tokens=3, return_token_ids=True, echo=True)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == list(b"abc")
    assert choice["text"].startswith("abc")


def test_tokens_there_and_back(url: str) -> None:
    answer = post(url, "/tokenize", prompt="é<|endoftext|>", return_token_strs=True)
    assert answer["tokens"] == [0xC3, 0xA9, 256]
    assert answer["token_strs"] == ["bytes:\\xc3", "bytes:\\xa9", "<|endoftext|>"]
    assert (answer["count"], answer["max_model_len"]) == (3, 512)
    assert post(url, "/detokenize", tokens=answer["tokens"]) == {"prompt": "é<|endoftext|>"}
    chat = post(url, "/tokenize", messages=[{"role": "user", "content": "hi"}])
    assert bytes(chat["tokens"]) == b"<user>hi<assistant>"
    info = httpx.get(url + "/tokenizer_info").json()
    assert (info["size"], info["vocabulary_size"]) == (257, 272)
    assert info["special_tokens"]["eos_token"] == "<|endoftext|>"
    assert info["eos_token"] == "<|endoftext|>"  # lm_eval asks for it there


def test_prometheus_sees_what_was_served(url: str) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[str, float]:
        text = httpx.get(url + "/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name: sample.value for sample in samples if set(sample.labels) <= {"model_name", "engine"}}

    before = read()
    usage = post(url, prompt=PROMPT, max_tokens=16, seed=2)["usage"]
    after = read()
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == usage["prompt_tokens"]
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == usage["completion_tokens"]
    assert after["vllm:time_to_first_token_seconds_count"] - before["vllm:time_to_first_token_seconds_count"] == 1
    wait_for(lambda: read()["diffuspec_steps_total"] > before["diffuspec_steps_total"])  # told a little later
    assert after["diffuspec_drafter_up"] == 1
    assert after["vllm:num_requests_running"] == 0


def test_openapi_describes_bodies_and_answers(url: str) -> None:
    document = httpx.get(url + "/openapi.json").json()
    operation = document["paths"]["/v1/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["required"] == ["prompt"]
    assert schema["examples"]
    assert "422" not in json.dumps(document["paths"])
    assert all(operation.get("summary") for methods in document["paths"].values() for operation in methods.values())
    names = json.dumps(document).split('"#/components/schemas/')[1:]
    assert {name.partition('"')[0] for name in names} <= set(document["components"]["schemas"])
