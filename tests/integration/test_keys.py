"""Every route but the probes needs an API key. Keys have limits and an expiry, and are never shown."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.base import GenerationRequest
from service.keys import digest_of
from service.settings import load_settings
from tests.integration.api_server import error_of, scripted_app, serving
from tests.integration.scripted_engine import ScriptedEngine, Step, deltas

PLAIN, HASHED, SMALL, OLD = "sk-plain-key", "sk-hashed-key", "sk-small-key", "sk-old-key"


class Clock:
    """A clock that stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def script(request: GenerationRequest) -> list[Step]:
    return [*([0.5] if request.prompt[0] == ord("s") else []), *deltas("ten tokens", sizes=(4,))]


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(
        f"""
        [[keys]]
        name = "small"
        hash = "sha256:{digest_of(SMALL).hex()}"
        expires = 2030-01-01
        max_sequences = 2
        requests_per_minute = 6
        tokens_per_minute = 100
        best_priority = 5

        [[keys]]
        name = "old"
        hash = "sha256:{digest_of(OLD).hex()}"
        expires = 2001-09-09T01:46:39Z
        """
    )
    return file


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(script)


@pytest.fixture
def url(tiny_target: Path, keys_file: Path, clock: Clock, engine: ScriptedEngine) -> Iterator[str]:
    settings = load_settings(
        overrides={
            "model.served_model_name": "tiny",
            "auth.api_keys": [PLAIN, "sha256:" + digest_of(HASHED).hex()],
            "auth.keys_file": keys_file,
        }
    )
    app = scripted_app(engine, tiny_target, settings, clock=clock, now=lambda: clock.now + 1e9)
    with serving(app) as url:
        yield url


def complete(url: str, key: str, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(url + "/v1/completions", json={"prompt": "x", **body}, headers=headers, timeout=60)


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong-key", f"Basic {PLAIN}", "Bearer", "Bearer é", PLAIN, f"Bearer {PLAIN} x"]
)
def test_every_route_but_the_probes_asks_for_a_key(url: str, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given.encode()}
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/unknown"),
        ("GET", "/health/"),
    ):
        answer = httpx.request(method, url + path, headers=headers)
        assert answer.status_code == 401, path
        assert error_of(answer)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert PLAIN not in answer.text
    assert all(httpx.get(url + path).status_code == 200 for path in ("/health", "/ready", "/startup"))


def test_keys_open_plain_or_hashed_and_a_hash_opens_nothing(url: str) -> None:
    assert [complete(url, key).status_code for key in (PLAIN, HASHED, SMALL)] == [200, 200, 200]
    assert complete(url, "sha256:" + digest_of(HASHED).hex()).status_code == 401
    assert complete(url, digest_of(HASHED).hex()).status_code == 401


def test_an_expired_key_opens_nothing(url: str, clock: Clock) -> None:
    assert complete(url, OLD).status_code == 401
    assert complete(url, SMALL).status_code == 200
    clock.now += 10 * 366 * 86400 * 3
    assert complete(url, SMALL).status_code == 401
    assert complete(url, PLAIN).status_code == 200


def test_a_key_has_so_many_requests_a_minute_and_is_told_when_to_come_again(url: str, clock: Clock) -> None:
    statuses = [complete(url, SMALL, max_tokens=1).status_code for _ in range(6)]
    assert statuses == [200] * 6
    refused = complete(url, SMALL)
    assert (refused.status_code, error_of(refused)["code"]) == (429, "key_limit")
    assert complete(url, PLAIN).status_code == 200  # other keys are not affected
    wait = int(refused.headers["retry-after"])
    clock.now += wait - 1.01 if wait > 1 else 0.0
    if wait > 1:
        assert complete(url, SMALL).status_code == 429
    clock.now += 1.01
    assert complete(url, SMALL).status_code == 200


def test_a_key_has_so_many_tokens_a_minute(url: str, clock: Clock) -> None:
    assert complete(url, SMALL, prompt="x" * 140).status_code == 200  # overdraws by 50, which a wait repays
    refused = complete(url, SMALL)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) == pytest.approx(30, abs=1)
    clock.now += 31
    assert complete(url, SMALL).status_code == 200


def test_a_prompt_that_is_only_read_is_charged(url: str, clock: Clock) -> None:
    read = complete(url, SMALL, prompt="x" * 150, max_tokens=0, echo=True)
    assert (read.status_code, read.json()["usage"]["total_tokens"]) == (200, 150)
    refused = complete(url, SMALL)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) == pytest.approx(30, abs=1)
    clock.now += 31
    assert complete(url, SMALL).status_code == 200


async def test_a_key_has_so_many_sequences_at_a_time(url: str, engine: ScriptedEngine) -> None:
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {SMALL}"}) as http:
        slow = asyncio.create_task(http.post("/v1/completions", json={"prompt": "slow", "n": 2}))
        async with asyncio.timeout(10):
            while len(engine.seen) < 2:  # noqa: ASYNC110 (the engine is in another thread)
                await asyncio.sleep(0.01)
        refused = await http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, error_of(refused)["code"]) == (429, "key_limit")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await slow).status_code == 200
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        never = await http.post("/v1/completions", json={"prompt": "x", "n": 3})
        assert (never.status_code, error_of(never)["param"]) == (400, "n")


def test_a_key_may_not_push_ahead(url: str, engine: ScriptedEngine) -> None:
    assert error_of(complete(url, SMALL, priority=4))["param"] == "priority"
    assert complete(url, SMALL, priority=5).status_code == 200
    assert complete(url, PLAIN, priority=-5).status_code == 200
    assert [(one.priority, one.tenant) for one in engine.seen] == [(5, "small"), (-5, "key-1")]


def test_logs_name_keys_and_never_show_them(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        complete(url, SMALL)
        complete(url, "sk-wrong-key")
    assert "key=small" in caplog.text
    assert SMALL not in caplog.text
    assert "sk-wrong-key" not in caplog.text


def test_metrics_may_be_left_open(tiny_target: Path) -> None:
    overrides = {"model.served_model_name": "tiny", "auth.api_keys": [PLAIN], "auth.open_metrics": True}
    with serving(scripted_app(ScriptedEngine(script), tiny_target, load_settings(overrides=overrides))) as url:
        assert httpx.get(url + "/metrics").status_code == 200
        assert httpx.get(url + "/version").status_code == 401


def test_the_description_says_where_a_key_is_needed(url: str) -> None:
    document = httpx.get(url + "/openapi.json", headers={"authorization": f"Bearer {PLAIN}"}).json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == (path not in ("/health", "/ready", "/startup")), path


def test_browsers_of_other_sites_are_told_nothing(url: str) -> None:
    asked = {"origin": "https://example.com", "access-control-request-method": "POST"}
    preflight = httpx.options(url + "/v1/completions", headers={**asked, "authorization": f"Bearer {PLAIN}"})
    answer = httpx.get(url + "/health", headers=asked)
    for one in (preflight, answer):
        assert not any(name.startswith("access-control") for name in one.headers)
