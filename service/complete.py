"""`diffuspec complete`: stream a completion from a running server to the terminal."""

import json
import time
from dataclasses import dataclass
from typing import Any, TextIO

import httpx


@dataclass(frozen=True, slots=True)
class CompletionOptions:
    """The arguments of `diffuspec complete`."""

    url: str
    prompt: str
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    model: str | None = None
    speculate: bool = True
    api_key: str | None = None

    def body(self) -> dict[str, Any]:
        """Return the request body, without unset fields."""
        fields: dict[str, Any] = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stop": list(self.stop) or None,
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "speculative": {"enabled": self.speculate},
        }
        return {name: value for name, value in fields.items() if value is not None}


def complete(options: CompletionOptions, output: TextIO, messages: TextIO) -> int:
    """Print prompt and completion on `output`, then the figures on `messages`. Returns the exit status."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    address = options.url.rstrip("/").removesuffix("/v1") + "/v1/completions"
    started = time.perf_counter()
    output.write(options.prompt)
    output.flush()
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(600.0, connect=10.0), headers=headers) as client,
            client.stream("POST", address, json=options.body()) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                answer.read()
                return _fail(messages, _message(answer))
            last = _print_chunks(answer, output)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return _fail(messages, f"cannot reach {options.url}: {error or type(error).__name__}; is the server running?")
    except KeyboardInterrupt:
        return 130
    output.write("\n")
    output.flush()
    if "error" in last:
        return _fail(messages, last["error"]["message"])
    if "usage" in last:
        print(summary(last, time.perf_counter() - started), file=messages)
    return 0


def _print_chunks(answer: httpx.Response, output: TextIO) -> dict[str, Any]:
    """Print the text as it arrives. Returns the last chunk: the usage, or an error."""
    chunk: dict[str, Any] = {}
    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        for choice in chunk.get("choices", ()):
            output.write(choice["text"])
            output.flush()
    return chunk


def summary(last: dict[str, Any], seconds: float) -> str:
    """Summarise the usage chunk in one line of figures."""
    tokens = last["usage"]["completion_tokens"]
    parts = [f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} per second)"]
    counts = last.get("metrics", {}).get("speculative_decoding", {})
    if counts.get("num_spec_steps"):
        parts += [
            f"{counts['num_spec_steps']} drafts of {counts['num_draft_tokens'] / counts['num_spec_steps']:.1f} tokens",
            f"{counts['draft_acceptance_rate']:.0%} accepted",
            f"{counts['mean_acceptance_length']:.2f} tokens per drafted step",
        ]
    else:
        parts.append("nothing drafted")
    return " · ".join(parts)


def _message(answer: httpx.Response) -> str:
    try:
        text: str = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = f"the server answered {answer.status_code}"
    return text


def _fail(messages: TextIO, text: str) -> int:
    print(f"\ndiffuspec: {text}", file=messages)
    return 1
