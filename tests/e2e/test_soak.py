"""A soak reports that its server died, and reads tool calls."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import find_unused_port
from tests.e2e.soak.__main__ import run
from tests.e2e.soak.bodies import KINDS, pool
from tests.e2e.soak.clients import Traffic, parse_stream, parse_whole
from tests.e2e.soak.server import Server


def test_a_soak_ends_with_its_server_and_reports_that(tmp_path: Path) -> None:
    options = argparse.Namespace(minutes=10.0, engine="embedded", seed=0, clients=2)
    url = f"http://127.0.0.1:{find_unused_port()}"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5); raise SystemExit(3)"]) as process:
        traffic = Traffic(url, pool(len(KINDS), 0), 0)
        report = run(options, Server(url, process, tmp_path / "log"), traffic)
    assert traffic.complaints[0] == "the server ended by itself with status 3"
    assert report["requests"] == len(traffic.seen) < 20  # clients pause before they try again
    assert report["mebibytes"]["max"] > 0


def test_a_call_is_the_same_whole_and_streamed() -> None:
    calls = [{"index": 0, "function": {"name": "open_file", "arguments": '{"line": 1}'}}]
    whole = {"index": 0, "message": {"content": None, "tool_calls": calls}, "token_ids": [1, 2], "finish_reason": "x"}
    parts = [{"function": {"name": "open_file", "arguments": ""}}, {"function": {"arguments": '{"line": 1}'}}]
    frames = [
        {"choices": [{"index": 0, "delta": {"tool_calls": parts[:1]}, "token_ids": [1]}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": parts[1:]}, "token_ids": [2], "finish_reason": "x"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    ]
    content = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames) + "data: [DONE]\n\n"
    answer = parse_whole({"choices": [whole], "usage": {"completion_tokens": 2}})
    assert answer.choices[0][0] == 'open_file{"line": 1}'
    assert parse_stream(content.encode()) == answer
