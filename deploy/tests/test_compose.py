"""The promises to a user of `docker compose up`, in the order in which they meet them."""

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import KEY, ROOT, Deployment, wait_for
from openai import OpenAI

PROMPT = "def read_lines(path):\n"
MAX_TOKENS = 900  # plain decoding takes longer than the short drain of the last test


def complete(url: str, key: str = "unused", **options: Any) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    answer = client.completions.create(model="diffuspec-python", prompt=PROMPT, max_tokens=32, temperature=0, **options)
    return answer.choices[0].text


def query(prometheus: str, expression: str) -> list[float]:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}, timeout=30).json()
    assert answer["status"] == "success", answer
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def test_it_says_where_to_look(deployment: Deployment) -> None:
    wait_for(lambda: "DiffuSpec is up" in deployment.compose("logs", "welcome"), 60, "a word of welcome")
    log = deployment.compose("logs", "--no-log-prefix", "welcome")
    for url in (deployment.url, deployment.prometheus, deployment.grafana):
        assert url in log
    assert "\\n" not in log


def test_it_completes_and_drafting_changes_nothing(deployment: Deployment) -> None:
    plain = complete(deployment.url, extra_body={"speculative": {"enabled": False}})
    assert plain.strip()
    assert complete(deployment.url) == plain


def test_everything_listens_on_this_machine_only(deployment: Deployment) -> None:
    for service in ("diffuspec", "prometheus", "grafana"):
        bindings = deployment.inspect(service)["NetworkSettings"]["Ports"].values()
        assert {binding["HostIp"] for published in bindings for binding in published or ()} == {"127.0.0.1"}


@pytest.mark.parametrize("service", ["diffuspec", "prometheus", "grafana", "welcome"])
def test_containers_can_do_little(deployment: Deployment, service: str) -> None:
    host = deployment.inspect(service)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert 0 < host["Memory"] <= 4 << 30
    assert 0 < host["PidsLimit"] <= 512


def test_the_service_is_nobody_without_a_compiler_on_a_disk_it_cannot_write(deployment: Deployment) -> None:
    def run(script: str) -> str:
        return deployment.compose("exec", "-T", "diffuspec", "sh", "-c", script).strip()

    assert run("id -u") == "10001"
    assert run("touch /app/x /usr/x /etc/x 2>/dev/null || echo no") == "no"
    assert run("touch /tmp/x && echo yes") == "yes"
    assert run("for name in cc gcc g++ clang ld as; do command -v $name; done; true") == ""
    assert run("grep CapEff /proc/self/status").split()[1].strip("0") == ""


def test_the_image_holds_no_secret_of_the_build(deployment: Deployment) -> None:
    script = "ls /run/secrets /etc/pip.conf 2>/dev/null; env | grep -i -E 'pip_|token|key' || true"
    image = ["docker", "run", "--rm", "--entrypoint", "sh", "diffuspec:cpu", "-c", script]
    assert subprocess.run(image, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == ""


def test_prometheus_scrapes_it_and_knows_the_rules(deployment: Deployment) -> None:
    complete(deployment.url)
    wait_for(lambda: query(deployment.prometheus, 'up{job="diffuspec"}') == [1.0], 60, "a scraped target")
    wait_for(lambda: sum(query(deployment.prometheus, "vllm:generation_tokens_total")) > 0, 60, "tokens in Prometheus")
    rules = httpx.get(f"{deployment.prometheus}/api/v1/rules", timeout=30).json()["data"]["groups"]
    assert {group["name"] for group in rules} == {"diffuspec-speculation", "diffuspec-serving", "diffuspec-alerts"}


def test_grafana_has_the_dashboards(deployment: Deployment, without: set[str]) -> None:
    if "grafana" in without:
        pytest.skip("Grafana's image is a stand-in here: COMPOSE_TEST_WITHOUT=grafana")
    found = httpx.get(f"{deployment.grafana}/api/search", params={"type": "dash-db"}, timeout=30).json()
    assert {dashboard["uid"] for dashboard in found} == {"diffuspec-serving", "diffuspec-speculation"}


def test_the_load_test_runs_for_half_a_minute_without_a_failure(deployment: Deployment) -> None:
    before = sum(query(deployment.prometheus, "vllm:generation_tokens_total"))
    command = ["run", "--rm", "loadtest"]
    deployment.compose(*command, LOADTEST_SECONDS="30", LOADTEST_USERS="4", LOADTEST_SHAPE="steady")
    report = deployment.compose("run", "--rm", "--entrypoint", "cat", "loadtest", "/reports/loadtest.html")
    assert all(kind in report for kind in ("TTFT", "ITL", "total"))
    wait_for(lambda: sum(query(deployment.prometheus, "vllm:generation_tokens_total")) > before, 60, "more tokens")


def test_keys_come_from_a_file_that_only_their_owner_reads(deployment: Deployment, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# of this test\n{KEY}\n")
    keys.chmod(0o600)
    owner = keys.stat()
    override = tmp_path / "keys.yml"
    override.write_text(
        json.dumps(
            {"services": {"diffuspec": {"environment": {"DIFFUSPEC_AUTH__API_KEYS_FILE": "/run/secrets/api_keys"}}}}
        )
    )
    files = ["--file", str(ROOT / "docker-compose.yml"), "--file", str(override)]
    user = {"SERVICE_UID": str(owner.st_uid), "SERVICE_GID": str(owner.st_gid), "API_KEYS_FILE": str(keys)}
    deployment.compose(*files, "up", "--detach", "--wait", "--no-deps", "diffuspec", **user)
    url = f"{deployment.url}/v1/models"
    assert httpx.get(url, timeout=30).status_code == 401
    assert httpx.get(url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30).status_code == 200
    assert KEY not in json.dumps(deployment.inspect("diffuspec"))
    # Without a key in the file the service must not start, rather than serve everybody.
    keys.write_text("# none yet\n")
    fresh = ["up", "--detach", "--wait", "--no-deps", "--force-recreate"]
    with pytest.raises(AssertionError, match=r"unhealthy|exited|restarting|timeout"):
        deployment.compose(*files, *fresh, "--wait-timeout", "60", "diffuspec", **user)
    deployment.compose(*fresh, "diffuspec")


def read_to_the_end(url: str, max_tokens: int, ends: list[str], started: threading.Semaphore) -> None:
    """Append how a stream ended: `done`, the code of an error in it, or the type of the connection error."""
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
    }
    body["speculative"] = {"enabled": False}
    end = "cut"
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            if answer.status_code == 200:
                started.release()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    end = "done"
                elif line.startswith('data: {"error"'):
                    end = json.loads(line[6:])["error"]["code"]
    except httpx.HTTPError as error:
        end = type(error).__name__
    ends.append(end)


@pytest.mark.parametrize(("drain", "max_tokens", "expected"), [("240", 200, "done"), ("0.2", MAX_TOKENS, "not_ready")])
def test_stopping_ends_every_stream_cleanly(
    deployment: Deployment, tmp_path: Path, drain: str, max_tokens: int, expected: str
) -> None:
    """With enough time, streams are finished. Without, each gets an error event instead of a broken connection."""
    override = json.dumps({"services": {"diffuspec": {"environment": {"DIFFUSPEC_SERVER__DRAIN_SECONDS": drain}}}})
    path = tmp_path / "drain.json"
    path.write_text(override)
    files = ["--file", str(ROOT / "docker-compose.yml"), "--file", str(path)]
    deployment.compose(*files, "up", "--detach", "--wait", "--no-deps", "diffuspec", SERVICE_STOP_GRACE="270s")
    ends: list[str] = []
    started = threading.Semaphore(0)
    arguments = (deployment.url, max_tokens, ends, started)
    threads = [threading.Thread(target=read_to_the_end, args=arguments) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert started.acquire(timeout=60)
    deployment.compose("stop", "diffuspec")
    for thread in threads:
        thread.join(300)
    assert ends == [expected] * len(threads)
    assert deployment.inspect("diffuspec")["State"]["ExitCode"] == 0
