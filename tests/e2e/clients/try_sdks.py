"""Run openai, litellm and langchain-openai: `python try_sdks.py URL STARTING_URL`.

The server at STARTING_URL has just been started and answers 503 while it loads. Afterwards it runs one sequence and
lets one wait, so a few requests at once get 429.
"""

import asyncio
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version

import httpx
import openai

PROMPT = "def read_lines(path):\n"
MODEL = "diffuspec-python"
SEEDED = {"max_tokens": 24, "temperature": 0.7, "seed": 11}
STRUCTURED = {"max_tokens": 200, "seed": 11}  # the bundled model writes much white space into JSON
MESSAGES = [{"role": "user", "content": "read a file"}]
LOADING_SECONDS = 120
COLOURS = ["red", "green"]
SCHEMA = {
    "title": "answer",
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}},
    "required": ["colour"],
    "additionalProperties": False,
}


class Seen:
    """An HTTP client for openai's SDK that records statuses and Retry-After headers."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.waits: list[float | None] = []

    def note(self, response: httpx.Response) -> None:
        self.statuses.append(response.status_code)
        if response.status_code in (429, 503):
            self.waits.append(float(response.headers["retry-after"]))

    async def note_async(self, response: httpx.Response) -> None:
        self.note(response)


def failure_of(client: openai.OpenAI, **body: object) -> openai.OpenAIError:
    """Return the error that a completion ends with."""
    try:
        answer = client.completions.create(**{"model": MODEL, "prompt": PROMPT, **body})
    except openai.OpenAIError as error:
        return error
    raise AssertionError(f"{body} was answered: {answer}")


def check_retries_while_loading(url: str, starting_url: str) -> None:
    """A client with retries gets its answer from a loading server, since 503 tells it when to retry."""
    deadline = time.monotonic() + LOADING_SECONDS
    while True:
        try:
            httpx.get(f"{starting_url}/startup", timeout=5)
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the second server does not listen"
            time.sleep(0.01)
    seen = Seen()
    with httpx.Client(event_hooks={"response": [seen.note]}) as http:
        client = openai.OpenAI(base_url=f"{starting_url}/v1", api_key="none", max_retries=60, http_client=http)
        completion = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4)
    assert completion.usage.completion_tokens == 4
    assert seen.statuses[0] == 503, seen.statuses
    assert seen.statuses[-1] == 200, seen.statuses
    assert all(seconds >= 1 for seconds in seen.waits)


def check_retries_while_full(url: str, starting_url: str) -> None:
    """Of six requests at once, two fit. The others get 429 with a time to retry, and all get their answer."""
    seen = Seen()

    async def many(max_retries: int) -> list[object]:
        async with httpx.AsyncClient(event_hooks={"response": [seen.note_async]}) as http:
            client = openai.AsyncOpenAI(
                base_url=f"{starting_url}/v1", api_key="none", max_retries=max_retries, http_client=http
            )
            requests = (
                client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, extra_body={"ignore_eos": True})
                for _ in range(6)
            )
            return await asyncio.gather(*requests, return_exceptions=True)

    refused = [answer for answer in asyncio.run(many(0)) if isinstance(answer, Exception)]
    assert refused
    assert all(isinstance(error, openai.RateLimitError) for error in refused), refused
    assert all(error.code == "queue_full" for error in refused)
    seen.statuses.clear()
    answers = asyncio.run(many(60))
    assert [answer.usage.completion_tokens for answer in answers] == [200] * 6, answers
    assert 429 in seen.statuses
    assert all(seconds >= 1 for seconds in seen.waits)


def check_openai(url: str, starting_url: str) -> None:
    """Whole and streamed: speculation changes no text and no score, and errors have openai's own classes."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    plain, drafted = (
        client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            logprobs=2,
            echo=True,
            **SEEDED,
            extra_body={"speculative": {"enabled": enabled}},
        )
        for enabled in (False, True)
    )
    assert plain.choices[0].text == drafted.choices[0].text
    scores = [choice.logprobs.token_logprobs[1:] for choice in (plain.choices[0], drafted.choices[0])]
    assert all(abs(a - b) < 1e-3 for a, b in zip(*scores, strict=True))
    assert plain.metrics["speculative_decoding"]["num_draft_tokens"] == 0
    assert drafted.metrics["speculative_decoding"]["num_draft_tokens"] > 0
    chunks = client.completions.create(
        model=MODEL, prompt=PROMPT, **SEEDED, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = [], None
    for chunk in chunks:
        texts += [choice.text for choice in chunk.choices]
        usage = chunk.usage or usage
    assert PROMPT + "".join(texts) == plain.choices[0].text
    assert usage.completion_tokens == 24
    for body, error in (({"temperature": 9}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError)):
        refusal = failure_of(client, **body)
        assert isinstance(refusal, error), refusal
        assert refusal.param == next(iter(body)), refusal


def check_openai_async(url: str, starting_url: str) -> None:
    """Six seeded chats at once give the same text, whole and streamed."""

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def whole() -> str:
                answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, **SEEDED)
                return answer.choices[0].message.content

            async def streamed() -> str:
                stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, **SEEDED, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(whole() for _ in range(3)), *(streamed() for _ in range(3)))

    assert len(set(asyncio.run(many()))) == 1


def check_timeouts(url: str, starting_url: str) -> None:
    """The client's own time limit works, and so does the server's `timeout` field, which gives status 504."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    failure = failure_of(client.with_options(timeout=0.001))
    assert isinstance(failure, openai.APITimeoutError), failure
    failure = failure_of(client, max_tokens=900, extra_body={"timeout": 0.01, "ignore_eos": True})
    assert isinstance(failure, openai.InternalServerError), failure
    assert (failure.status_code, failure.code) == (504, "request_timeout"), failure


def check_litellm(url: str, starting_url: str) -> None:
    """Text and chat, whole and streamed, JSON by schema, a tool, and litellm's error for a context that is too long."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it fetches prices
    import litellm

    litellm.telemetry = False
    options = {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    whole = litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, **SEEDED, **options)
    streamed = litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, **SEEDED, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.choices[0].message.content
    legacy = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt=PROMPT, **SEEDED, **options)
    assert legacy.choices[0].text
    answer = litellm.completion(
        model=f"openai/{MODEL}",
        messages=MESSAGES,
        **STRUCTURED,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        **options,
    )
    assert "colour" in answer.choices[0].message.content
    answer = litellm.completion(
        model=f"openai/{MODEL}",
        messages=MESSAGES,
        **STRUCTURED,
        tools=[{"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}],
        tool_choice={"type": "function", "function": {"name": "paint"}},
        **options,
    )
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in COLOURS
    try:
        litellm.completion(model=f"openai/{MODEL}", messages=[{"role": "user", "content": "x = 1\n" * 4000}], **options)
    except litellm.BadRequestError:
        return
    raise AssertionError("a prompt beyond the context was not refused")


def check_langchain(url: str, starting_url: str) -> None:
    """Invoke, stream, batch, and structured output by a schema and by a tool."""
    from langchain_openai import ChatOpenAI, OpenAI

    options = {"base_url": f"{url}/v1", "api_key": "none", "model": MODEL, "max_retries": 0}
    chat = ChatOpenAI(**options, max_tokens=24, temperature=0.7, seed=11)
    whole = chat.invoke("read a file").content
    assert "".join(str(chunk.content) for chunk in chat.stream("read a file")) == whole
    assert [answer.content for answer in chat.batch(["read a file"] * 3)] == [whole] * 3
    for method in ("json_schema", "function_calling"):
        structured = ChatOpenAI(**options, **STRUCTURED).with_structured_output(SCHEMA, method=method)
        assert structured.invoke("which?")["colour"] in COLOURS
    assert OpenAI(**options, max_tokens=8, temperature=0).invoke(PROMPT)


CHECKS: list[tuple[str, Callable[[str, str], None]]] = [
    ("openai", check_retries_while_loading),  # first, because the second server soon has loaded
    ("openai", check_retries_while_full),
    ("openai", check_openai),
    ("openai", check_openai_async),
    ("openai", check_timeouts),
    ("litellm", check_litellm),
    ("langchain-openai", check_langchain),
]


def main(url: str, starting_url: str) -> int:
    failed = 0
    for package, check in CHECKS:
        try:
            check(url, starting_url)
        except Exception:
            traceback.print_exc()
            failed += 1
            print(f"FAILED  {package} {version(package)} {check.__name__}", flush=True)
        else:
            print(f"passed  {package} {version(package)} {check.__name__}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
