"""Clients that we did not write, unchanged, against a running server: `python run.py URL`.

Prints a line for each check with the client's version, and ends with status 1 if one failed. `make test-clients` makes
the environment, starts a server and runs this.
"""

import asyncio
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

PROMPT = "def read_lines(path):\n"
MODEL = "diffuspec-python"
SEEDED = {"max_tokens": 24, "temperature": 0.7, "seed": 11}
MESSAGES = [{"role": "user", "content": "read a file"}]


def check_openai(url: str) -> None:
    """Sync, async, streamed, retried and timed out; speculation changes no text and no score."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2)
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
    chunks = client.completions.create(
        model=MODEL, prompt=PROMPT, **SEEDED, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = [], None
    for chunk in chunks:
        texts += [choice.text for choice in chunk.choices]
        usage = chunk.usage or usage
    assert PROMPT + "".join(texts) == plain.choices[0].text
    assert usage.completion_tokens == 24

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as session:
            answers = await asyncio.gather(
                *(session.chat.completions.create(model=MODEL, messages=MESSAGES, **SEEDED) for _ in range(6))
            )
        return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(many()))) == 1
    try:
        client.with_options(timeout=0.001, max_retries=0).completions.create(model=MODEL, prompt=PROMPT)
    except openai.APITimeoutError:
        pass
    else:
        raise AssertionError("no timeout")
    for body, error in (({"temperature": 9}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError)):
        try:
            client.completions.create(**{"model": MODEL, "prompt": PROMPT, **body})
        except error:
            continue
        raise AssertionError(f"{body} was not refused")


def check_litellm(url: str) -> None:
    """Text and chat, whole and streamed, JSON by schema, and its own error for a context that is too long."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches prices
    import litellm

    litellm.telemetry = False
    options = {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    whole = litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, **SEEDED, **options)
    streamed = litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, **SEEDED, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.choices[0].message.content
    legacy = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt=PROMPT, **SEEDED, **options)
    assert legacy.choices[0].text
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = litellm.completion(
        model=f"openai/{MODEL}",
        messages=MESSAGES,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        **options,
    )
    assert "ok" in answer.choices[0].message.content
    try:
        litellm.completion(model=f"openai/{MODEL}", messages=[{"role": "user", "content": "x = 1\n" * 4000}], **options)
    except litellm.BadRequestError:
        return
    raise AssertionError("a prompt beyond the context was not refused")


def check_langchain(url: str) -> None:
    """Invoke, stream, batch, and structured output by a schema."""
    from langchain_openai import ChatOpenAI, OpenAI

    options = {"base_url": f"{url}/v1", "api_key": "none", "model": MODEL, "max_retries": 0}
    chat = ChatOpenAI(**options, max_tokens=24, temperature=0.7, seed=11)
    whole = chat.invoke("read a file").content
    assert "".join(str(chunk.content) for chunk in chat.stream("read a file")) == whole
    assert len(chat.batch(["a", "b", "c"])) == 3
    schema = {
        "title": "answer",
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    structured = ChatOpenAI(**options, max_tokens=60).with_structured_output(schema, method="json_schema")
    assert structured.invoke("which?")["colour"] in ("red", "green")
    assert OpenAI(**options, max_tokens=8, temperature=0).invoke(PROMPT)


def check_schemathesis(url: str) -> None:
    """Bodies made from the API's own description: no 5xx, and no answer that the description does not know."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{url}/openapi.json", "--url", url, "--seed", "7", "--max-examples", "6", "--phases", "fuzzing"),
        *("--request-timeout", "120", "--exclude-path", "/metrics"),
        *(
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


CHECKS: dict[str, Callable[[str], None]] = {
    "openai": check_openai,
    "litellm": check_litellm,
    "langchain-openai": check_langchain,
    "schemathesis": check_schemathesis,
}


def main(url: str, names: list[str]) -> int:
    failed = 0
    for name, check in CHECKS.items():
        if names and name not in names:
            continue
        try:
            check(url)
        except Exception:
            traceback.print_exc()
            failed += 1
            print(f"FAILED  {name} {version(name)}", flush=True)
        else:
            print(f"passed  {name} {version(name)}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
