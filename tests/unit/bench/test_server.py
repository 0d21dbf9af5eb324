"""The benchmark's HTTP client against the real application on a real socket."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn

from service.app import create_app
from service.bench.interleave import Task, measure
from service.bench.prompts import Prompt, batches
from service.bench.records import Workload
from service.bench.server import ServerClient, ServerContestant, ServerError
from service.bench.summary import summarize
from service.settings import load_settings
from service.wiring import build_engine, build_metrics

TOKENS = 24


@pytest.fixture
async def client(tiny_target: Path) -> AsyncIterator[ServerClient]:
    settings = load_settings(None, {"model.target": str(tiny_target), "model.drafter": "prompt-lookup"})
    metrics = build_metrics(settings)
    engine, load_tokenizer = build_engine(settings, metrics)
    app = create_app(settings, engine, load_tokenizer, metrics)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started or engine.status().phase == "loading":  # noqa: ASYNC110 - neither has an event
            await asyncio.sleep(0.02)
        client = ServerClient(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/")
        yield client
        await client.aclose()
        server.should_exit = True
        await serving


async def test_a_server_is_measured_with_and_without_speculation(client: ServerClient, prompts: list[Prompt]) -> None:
    await client.connect()
    assert client.context_length == 512
    contestants = [ServerContestant("plain", client, False), ServerContestant("speculative", client, True)]
    task = Task(Workload(3, 0.0, TOKENS), batches(prompts, 3) * 2, [])
    record = await measure(contestants, task, 0, float("inf"), asyncio.get_running_loop().time, lambda text: None)
    assert record.mismatches == ()
    plain, speculative = summarize(record)
    assert plain.num_tokens == speculative.num_tokens == 2 * 3 * TOKENS
    assert plain.acceptance.length == 1.0
    assert plain.acceptance.num_drafted == 0
    assert speculative.acceptance.num_steps + speculative.acceptance.num_accepted == 2 * 3 * (TOKENS - 1)
    assert speculative.speed_up is not None
    assert speculative.first_token_seconds is not None
    assert speculative.first_token_seconds > 0


async def test_the_server_tokenizes_for_us(client: ServerClient) -> None:
    await client.connect()
    assert await client.tokenize("import os") == list(b"import os")


async def test_what_the_server_refuses_is_passed_on(client: ServerClient) -> None:
    await client.connect()
    contestant = ServerContestant("plain", client, speculates=False)
    with pytest.raises(ServerError, match="answered 400"):
        await contestant.run([Prompt("beyond the vocabulary", (100_000,))], Workload(1, 0.0, 4), 0, 0)
    client.model = "another"
    with pytest.raises(ServerError, match="has no model 'another'"):
        await client.connect()


async def test_nobody_there_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = ServerClient(f"http://127.0.0.1:{port}")
    with pytest.raises(ServerError, match="cannot reach"):
        await client.connect()
    await client.aclose()
