"""Many requests, half of them cancelled midway: all memory is freed, and the others' text is unchanged."""

import asyncio
import json
import sys

import httpx
import pytest

from tests.e2e.conftest import Server

PROMPTS = ["def main():\n", "import os\n\n", "class Reader:\n    def __init__(self, path):\n", "for line in lines:\n"]
CONCURRENCY = 16
MAX_GROWTH_BYTES = 32 << 20  # the allocator's slack; a leak of one slot per request would be hundreds of MB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def body(index: int) -> dict[str, object]:
    return {
        "model": "diffuspec-python",
        "prompt": PROMPTS[index % len(PROMPTS)],
        "max_tokens": 24,
        "temperature": (0.0, 0.7)[index // len(PROMPTS) % 2],
        "seed": index % 8,
        "stream": True,
    }


async def complete(client: httpx.AsyncClient, index: int, cancel: bool) -> str | None:
    """Return the request's text, or None if it was cancelled after the first piece."""
    pieces = []
    async with client.stream("POST", "/v1/completions", json=body(index)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                pieces += [choice["text"] for choice in chunk["choices"]]
                if cancel:
                    return None
    return "".join(pieces)


async def run(url: str, count: int, cancelling: bool, concurrency: int = CONCURRENCY) -> dict[int, str]:
    """Return the texts of the requests that were not cancelled. Asserts that they depend on the request alone."""
    texts: dict[int, str] = {}
    limit = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(index: int) -> None:
            async with limit:
                text = await complete(client, index, cancelling and index % 16 >= 8)
            if text is not None:
                assert texts.setdefault(index % 8, text) == text

        await asyncio.gather(*(one(index) for index in range(count)))
    return texts


async def idle(url: str) -> dict[str, float]:
    """Return the gauges once nothing runs any more."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    async with httpx.AsyncClient(base_url=url) as client:
        for _ in range(100):
            lines = (await client.get("/metrics")).text.splitlines()
            gauges = {name: float(line.split()[-1]) for name in names for line in lines if line.startswith(name)}
            if not any(gauges.values()):
                break
            await asyncio.sleep(0.1)
    return gauges


async def test_memory_returns_after_a_thousand_requests_half_of_them_cancelled(server: Server) -> None:
    # First use every slot of the caches, because their memory pages are allocated on first use.
    expected = await run(server.url, 480, cancelling=False, concurrency=48)
    await run(server.url, 480, cancelling=True)
    before = server.resident_bytes
    texts = await run(server.url, 1000, cancelling=True)
    assert texts == expected
    assert set((await idle(server.url)).values()) == {0.0}
    assert server.resident_bytes - before < MAX_GROWTH_BYTES
