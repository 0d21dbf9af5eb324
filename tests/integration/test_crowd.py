"""More connections than the server keeps, and a page of documentation that needs nothing from the network."""

import re
from contextlib import ExitStack
from pathlib import Path

import httpx

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
