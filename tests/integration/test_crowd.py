"""More connections than the server keeps, and a page of documentation that needs nothing from the network."""

import re
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from service.settings import load_settings
from tests.integration.api_server import error_of, running, scripted_app, serving, url_of, wait_for
from tests.integration.scripted_engine import ScriptedEngine, deltas

BODY = {"prompt": "hello"}


def test_too_many_connections_are_told_to_come_again_and_probes_are_answered(tiny_target: Path) -> None:
    most = 3
    settings = load_settings(overrides={"model.served_model_name": "tiny", "server.max_connections": most})
    engine = ScriptedEngine(lambda request: list(deltas("text", sizes=(2, 2))))
    app = scripted_app(engine, tiny_target, settings, num_connections=lambda: len(server.server_state.connections))
    with running(app) as server:
        url = url_of(server)
        wait_for(lambda: not server.server_state.connections)
        with ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(base_url=url)) for _ in range(most + 1)]
            for client in clients[:most]:
                assert client.post("/v1/completions", json=BODY).status_code == 200
            refused = clients[most].post("/v1/completions", json=BODY)
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "too_many_connections"
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["connection"] == "close"
            described = app.openapi()["paths"]
            for path in (path for path in described if "{" not in path):
                (method,) = described[path]
                with httpx.Client(base_url=url) as client:
                    status = client.request(method, path).status_code
                assert (
                    status != 503
                    or "too_many_connections" in described[path][method]["responses"]["503"]["description"]
                )
            for path in ("/health", "/ready", "/startup", "/metrics"):
                with httpx.Client(base_url=url) as probe:
                    assert probe.get(path).status_code == 200
            assert clients[0].post("/v1/completions", json=BODY).status_code == 200  # those who are in stay in
        wait_for(lambda: not server.server_state.connections)
        assert httpx.post(url + "/v1/completions", json=BODY).status_code == 200


def test_the_documentation_page_is_whole_without_a_network(tiny_target: Path) -> None:
    app = scripted_app(ScriptedEngine(lambda request: []), tiny_target)
    with serving(app) as url:
        page = httpx.get(url + "/docs").text
        needed = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert len(needed) >= 3
        for address in [*needed, "/openapi.json"]:
            assert address.startswith("/"), f"{address} is somewhere else"
            answer = httpx.get(url + address)
            assert answer.status_code == 200
            assert len(answer.content) > 1000


def test_a_request_for_a_web_socket_is_answered_like_any_other(
    tiny_target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Or it would pass by keys, bounds and the log, where a library for web sockets is installed (as vLLM does)."""
    caplog.set_level("INFO", logger="service")
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    with serving(scripted_app(ScriptedEngine(lambda request: []), tiny_target)) as url:
        answer = httpx.get(url + "/v1/models", headers=upgrade)
    assert answer.status_code == 200
    assert answer.json()["data"][0]["id"] == "tiny"
    lines = [record.getMessage() for record in caplog.records if record.name == "service.requests"]
    assert any(answer.headers["x-request-id"] in line for line in lines)
