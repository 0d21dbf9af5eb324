"""Every query of every dashboard and rule returns data from a real Prometheus that scrapes the real, loaded service."""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, Server
from tests.e2e.prometheus import Prometheus, missing_binary, run_prometheus

pytestmark = pytest.mark.skipif(
    bool(missing_binary()), reason=f"needs {missing_binary()} (Debian: apt-get install prometheus)"
)

DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
WINDOW = "20s"  # what Grafana would insert for $__rate_interval
MAX_SECONDS = 300  # generous
PROMPTS = ["def main():\n", "import os\n\n", "class Reader:\n    def __init__(self, path):\n", "for line in lines:\n"]
SPECULATION: list[dict[str, Any]] = [
    {"policy": "goodput"},
    {"policy": "fixed", "max_draft_tokens": 12},
    {"policy": "paper"},
    {"enabled": False},
]


def panels(path: Any) -> Iterator[dict[str, Any]]:
    dashboard = json.loads(path.read_text())
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


def queries() -> dict[str, str]:
    """Return every query by `dashboard / panel / letter`, with Grafana's variables filled in."""
    found = {}
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel.get("targets", ()):
                query = target["expr"].replace("$__rate_interval", WINDOW)
                query = query.replace("$model_name", ".*").replace("$instance", ".*")
                assert "$" not in query, f"an unknown variable in {query}"
                found[f"{path.stem} / {panel['title']} / {target['refId']}"] = query
    return found


def complete(url: str, index: int) -> None:
    """Stream request `index`. Together the indices cover all policies, greedy and sampled."""
    body = {
        "prompt": PROMPTS[index % len(PROMPTS)] * (1 + index % 3),
        "max_tokens": 48,
        "temperature": 0.0 if index % 3 else 0.6,
        "seed": index,
        "stream": True,
        "speculative": SPECULATION[index // 8 % len(SPECULATION)],
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        for _ in answer.iter_lines():
            pass


def unanswered(asked: dict[str, str], ask: Callable[[str], list[float]]) -> set[str]:
    return {name for name, query in asked.items() if not any(math.isfinite(value) for value in ask(query))}


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the server, which is under load until the end of the tests."""
    done = threading.Event()
    failures: list[BaseException] = []

    def load(first: int, concurrency: int) -> None:
        try:
            for index in range(first, 4000, concurrency):
                if done.is_set():
                    return
                complete(server.url, index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(first, 2)) for first in range(2)]
    target = server.url.removeprefix("http://")
    with run_prometheus(target, tmp_path_factory.mktemp("prometheus")) as running:
        for thread in threads:
            thread.start()
        try:
            yield running
        finally:
            done.set()
            for thread in threads:
                thread.join(120)
    assert not failures


def test_every_query_of_every_dashboard_returns_data(prometheus: Prometheus) -> None:
    asked = queries()
    assert len(asked) > 50
    deadline = time.monotonic() + MAX_SECONDS
    while missing := unanswered(asked, prometheus.samples):
        assert time.monotonic() < deadline, f"no data for {sorted(missing)}"
        asked = {name: asked[name] for name in missing}
        time.sleep(1)


def test_the_dashboards_variables_have_values(prometheus: Prometheus) -> None:
    for path in DASHBOARDS:
        for variable in json.loads(path.read_text())["templating"]["list"]:
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match is not None
            series = prometheus.get("series", **{"match[]": match[1].replace("$model_name", ".*")})
            assert {entry[match[2]] for entry in series}


def test_every_rule_is_evaluated_and_records_something(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + MAX_SECONDS
    while True:
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        recorded = {rule["name"]: rule["name"] for rule in rules if rule["type"] == "recording"}
        missing = unanswered(recorded, prometheus.samples)
        if not missing and all(rule["health"] == "ok" for rule in rules):
            break
        assert time.monotonic() < deadline, (missing, [rule for rule in rules if rule["health"] != "ok"])
        time.sleep(1)
    assert len(recorded) > 8
    alerts = {rule["name"]: rule for rule in rules if rule["type"] == "alerting"}
    assert len(alerts) > 8
    paging = {name for name, rule in alerts.items() if rule["labels"]["severity"] == "page" and rule["alerts"]}
    assert not paging, "a healthy service would page somebody"


def test_every_metric_that_a_rule_or_dashboard_names_exists(prometheus: Prometheus) -> None:
    """Alerts are silent on a healthy service, so the tests above would miss a misspelt metric."""
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    texts = [*queries().values(), *(rule["query"] for rule in rules)]
    known = set(prometheus.get("label/__name__/values"))
    pattern = r"(?<![\w:])(?:vllm:|diffuspec_|process_|model:|model_batch:|instance:)[a-z0-9_:]+"
    named = {name for text in texts for name in re.findall(pattern, text)}
    assert len(named) > 30
    assert named <= known, named - known
