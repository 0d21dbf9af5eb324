"""Contestants behind HTTP: one running server, with speculation off or on by request."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx

from service.bench.prompts import Prompt
from service.bench.records import Acceptance, Generation, Mismatch, Pass, Role, Workload

COMPLETIONS, TOKENIZE, MODELS = "/v1/completions", "/tokenize", "/v1/models"


class ServerError(Exception):
    """The server can't be reached, or it refused; the message has its answer."""


class ServerClient:
    """An HTTP client with the calls that the benchmark needs. Close it with `aclose`."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(600.0, connect=10.0),
            limits=httpx.Limits(max_connections=None),
        )
        self.url, self.model = url, model
        self.context_length = 0  # known after `connect`

    async def connect(self) -> None:
        """Ask for the model's name, unless one was given, and its context length. Raises ServerError."""
        models = (await self._json("GET", MODELS))["data"]
        cards = [card for card in models if self.model in (None, card["id"])]
        if not cards:
            raise ServerError(f"{self.url} has no model {self.model!r}, only {', '.join(c['id'] for c in models)}")
        self.model, self.context_length = cards[0]["id"], cards[0]["max_model_len"]

    async def tokenize(self, text: str) -> list[int]:
        """Tokenize with the server's tokenizer, so that prompts can be cut to length. Raises ServerError."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        tokens: list[int] = (await self._json("POST", TOKENIZE, body))["tokens"]
        return tokens

    async def complete(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed completion. Raises ServerError, possibly in the middle of the stream."""
        async with self._http.stream("POST", COMPLETIONS, json={"model": self.model, "stream": True} | body) as answer:
            if answer.status_code != httpx.codes.OK:
                raise ServerError(f"{self.url} answered {answer.status_code}: {(await answer.aread()).decode()[:300]}")
            async for line in answer.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                chunk: dict[str, Any] = json.loads(line[5:])
                if "error" in chunk:
                    raise ServerError(f"{self.url} failed: {chunk['error'].get('message')}")
                yield chunk

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"cannot reach {self.url}: {error}") from None
        if answer.status_code != httpx.codes.OK:
            raise ServerError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}")
        content: dict[str, Any] = answer.json()
        return content


class ServerContestant:
    """The server, with or without speculation."""

    tolerated_margin: float | None = None

    def __init__(
        self, name: str, client: ServerClient, speculates: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.name = name
        self.role: Role = "other" if speculates else "reference"
        self._client, self._speculates, self._clock = client, speculates, clock

    def takes(self, workload: Workload) -> bool:
        return True

    async def run(self, prompts: Sequence[Prompt], workload: Workload, pair: int, seed: int) -> Pass:
        """Let the server read every prompt before the clock starts: the second contestant would find it cached."""
        first_token = replace(workload, max_tokens=1)
        await asyncio.gather(*(self._generate(prompt, first_token, seed, 0.0) for prompt in prompts))
        started = self._clock()
        asked = (self._generate(prompt, workload, seed + i, started) for i, prompt in enumerate(prompts))
        generations = tuple(await asyncio.gather(*asked))
        ended = max(generation.delta_seconds[-1] for generation in generations)
        return Pass(self.name, pair, ended, generations)

    async def margin(self, prompt: Prompt, mismatch: Mismatch, max_tokens: int) -> float | None:
        return None

    async def _generate(self, prompt: Prompt, workload: Workload, seed: int, started: float) -> Generation:
        body = {
            "prompt": list(prompt.tokens),
            "max_tokens": workload.max_tokens,
            "temperature": workload.temperature,
            "seed": seed,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
            "speculative": {"enabled": self._speculates},
        }
        tokens: list[int] = []
        arrivals: list[float] = []
        counts: dict[str, int] | None = None
        async for chunk in self._client.complete(body):
            for choice in chunk.get("choices", ()):
                if choice.get("token_ids"):
                    tokens += choice["token_ids"]
                    arrivals.append(self._clock() - started)
            if "metrics" in chunk:
                counts = chunk["metrics"]["speculative_decoding"]
        if not tokens:
            raise ServerError(f"{self._client.url} returned no token ids: is it a diffuspec server?")
        return Generation(prompt.name, tuple(tokens), tuple(arrivals), reported=_reported(len(tokens), counts))


def _reported(num_tokens: int, counts: dict[str, int] | None) -> Acceptance | None:
    """Compute acceptance from vLLM's counts. They cover drafted steps only; every other step adds one token.

    The first token came from the step that read the prompt.
    """
    if counts is None:
        return None
    accepted = counts["num_accepted_draft_tokens"]
    return Acceptance(
        num_steps=max(num_tokens - 1 - accepted, counts["num_spec_steps"]),
        num_drafted_steps=counts["num_spec_steps"],
        num_drafted=counts["num_draft_tokens"],
        num_accepted=accepted,
    )
