"""A real server over tiny models whose drafter fails as it is told, and a look at what is left inside it."""

import asyncio
import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from drafters.base import Pipeline, StepRecord
from drafters.pipeline import DraftPipeline
from service.app import create_app
from service.engine.embedded import EmbeddedEngine, Progress
from service.engine.scheduler import SchedulerLimits
from service.engine.sequence import Decoding
from service.settings import load_settings
from service.wiring import build_metrics, build_pipeline, build_tokenizer, warm_up
from tests.checkpoints import CONTEXT_LENGTH, TOKENIZER_LENGTH
from tests.faulty import FaultyTransformer
from tests.integration.api_server import running, url_of, wait_for
from transformer.model import Transformer
from verifiers.base import Verifier
from verifiers.torch_lm import TorchVerifier

MAX_RUNNING = 4
KEY = "sk-a-key-for-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}


class Pace:
    """Observes the engine's steps, and makes each of them take so long, or as long as it is held."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._may_go = threading.Event()
        self.hold = self._may_go.clear
        self.go()

    def go(self) -> None:
        """On, at full speed."""
        self.seconds = 0.0
        self._may_go.set()

    def __call__(self, _: StepRecord) -> None:
        time.sleep(self.seconds)
        assert self._may_go.wait(60)


@dataclass
class FaultyServer:
    server: uvicorn.Server
    engine: EmbeddedEngine
    pipeline: DraftPipeline
    drafter: FaultyTransformer
    pace: Pace
    clients: ThreadPoolExecutor
    http: httpx.Client
    _plain: dict[str, list[int]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return url_of(self.server)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.post("/v1/completions", json=body)

    def start(self, body: dict[str, Any]) -> "Future[httpx.Response]":
        """The same in a thread."""
        return self.clients.submit(self.post, body)

    def plain(self, body: dict[str, Any]) -> list[int]:
        """What plain decoding answers to a request of one choice."""
        name = repr(body)
        if name not in self._plain:
            self._plain[name] = tokens_of(self.post(body | {"speculative": {"enabled": False}}))
        return self._plain[name]

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all samples with these labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert samples, f"{name} is not shown"
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def decodings(self) -> list[Decoding]:
        """Everyone who runs or waits in the engine, right now."""
        core = self.engine._core
        assert core is not None
        return [*core._scheduler.running, *core._scheduler.waiting, *core._arrived]

    def leftovers(self) -> dict[str, Any]:
        """Whatever is held for a request; empty when there is none."""
        core, diffusion = self.engine._core, self.pipeline._diffusion
        assert core is not None
        assert diffusion is not None
        slots = core._scheduler._slots
        held = {
            "live": list(core._live),
            "reserved positions": core._scheduler._num_reserved,
            "slots": slots.num_slots - slots.num_free,
            "streams": list(self.engine._streams),
            "pipeline": list(self.pipeline._policy._states),
            "drafter": len(diffusion._prefixes),  # type: ignore[attr-defined]
            "key": self.server.config.app.state.serving.key_ring.keys[0].num_sequences,  # type: ignore[union-attr]
            "running": self.metric("vllm:num_requests_running"),
            "waiting": self.metric("vllm:num_requests_waiting"),
            "cache": self.metric("vllm:kv_cache_usage_perc"),
            "requests": len(self.server.server_state.tasks),
            "tasks": self.tasks() - 2,  # the server's own, and its lifespan's
        }
        return {name: value for name, value in held.items() if value}

    def tasks(self) -> int:
        assert self.engine._events is not None
        return len(asyncio.all_tasks(self.engine._events))

    @contextmanager
    def ending(self, **expected: int) -> Iterator[None]:
        """Afterwards nothing is left, and so many sequences have ended, by reason."""
        before = self.ended()
        yield
        left: dict[str, Any] = {}

        def is_empty() -> bool:
            left.clear()
            left.update(self.leftovers())
            return not left

        try:
            wait_for(is_empty, 20)
        except AssertionError:
            raise AssertionError(f"left behind: {left}") from None
        assert {reason: count - before[reason] for reason, count in self.ended().items() if count > before[reason]} == {
            reason: count for reason, count in expected.items() if count
        }
        assert self.http.get("/ready").status_code == 200

    def ended(self) -> dict[str, float]:
        """Sequences so far, by how they ended."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {
            sample.labels["finished_reason"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "vllm:request_success_total"
        }


def tokens_of(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    tokens: list[int] = choice["token_ids"]
    assert len(tokens) == answer.json()["usage"]["completion_tokens"]
    return tokens


@contextmanager
def faulty_server(target: Path, drafter: Path, **overrides: Any) -> Iterator[FaultyServer]:
    settings = load_settings(
        overrides={
            "model.target": str(target),
            "model.drafter": str(drafter),
            "model.served_model_name": "tiny",
            "speculation.policy": "fixed",  # so that the drafter is asked at every step
            "speculation.fixed_draft_tokens": 4,
            "auth.api_keys": [KEY],
            "auth.open_metrics": True,
            **overrides,
        }
    )
    built: dict[str, Any] = {}

    def load(progress: Progress) -> tuple[Verifier, Pipeline]:
        model = Transformer.load(target)
        built["drafter"] = FaultyTransformer.load(drafter)
        built["pipeline"] = build_pipeline(settings, model.config, built["drafter"])
        warm_up(built["pipeline"])
        return TorchVerifier(model, MAX_RUNNING, CONTEXT_LENGTH, TOKENIZER_LENGTH), built["pipeline"]

    metrics, pace = build_metrics(settings), Pace()
    limits = SchedulerLimits(MAX_RUNNING, max_waiting=16, prefill_chunk_tokens=8)
    engine = EmbeddedEngine(load, limits, (metrics.observe, pace), hung_after_seconds=settings.scheduler.hang_seconds)
    app = create_app(settings, engine, functools.partial(build_tokenizer, target), metrics)
    with (
        running(app) as server,
        ThreadPoolExecutor(16) as clients,
        httpx.Client(base_url=url_of(server), headers=HEADERS, timeout=60) as http,
    ):
        faulty = FaultyServer(server, engine, built["pipeline"], built["drafter"], pace, clients, http)
        wait_for(lambda: faulty.tasks() == 2)  # whoever asked whether it is ready has left
        yield faulty
