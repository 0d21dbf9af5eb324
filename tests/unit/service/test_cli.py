"""The command line: help names everything, mistakes get one sentence, and `complete` works against a server."""

import io
import json
from pathlib import Path

import pytest

from service.cli import main
from service.complete import CompletionOptions, complete
from service.engine.base import SpeculationStats, TokenDelta
from tests.integration.api_server import scripted_app, serving
from tests.integration.scripted_engine import ScriptedEngine


def test_help_names_the_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--help"], ("serve", "complete", "check", "bench", "--config")),
        (["serve", "--help"], ("--host", "--port", "--engine", "--target", "--drafter", "--policy", "--threads")),
        (["complete", "--help"], ("--url", "--temperature", "standard input")),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(name in text for name in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "many"], "server.port"),
        (["serve", "--policy", "best"], "speculation.policy"),
        (["serve", "--config", "/nowhere.toml"], "cannot read the configuration file"),
        (["check", "--engine", "magic"], "model.engine"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_complete_streams_and_sums_up(tiny_target: Path) -> None:
    stats = SpeculationStats(2, 4, 6, 3, [1, 0, 0, 1, 0])
    engine = ScriptedEngine(
        lambda request: [
            TokenDelta(tokens=tuple(b"wor")),
            TokenDelta(tokens=tuple(b"ld"), finish_reason="length", stats=stats),
        ]
    )
    with serving(scripted_app(engine, tiny_target)) as url:
        output, messages = io.StringIO(), io.StringIO()
        options = CompletionOptions(url, "hello ", max_tokens=5, seed=3, stop=("!",), speculate=False)
        assert complete(options, output, messages) == 0
        assert output.getvalue() == "hello world\n"
        assert "2 drafts of 3.0 tokens · 50% accepted · 2.50 tokens per drafted step" in messages.getvalue()
        assert "5 tokens in" in messages.getvalue()
        request = engine.seen[0]
        assert (request.max_tokens, request.rules.seed, request.speculation.enabled) == (5, 3, False)
        refused = io.StringIO()
        assert complete(CompletionOptions(url, ""), io.StringIO(), refused) == 1
        assert "prompt" in refused.getvalue()


def test_complete_without_a_server_says_so() -> None:
    messages = io.StringIO()
    assert complete(CompletionOptions("http://127.0.0.1:9", "x"), io.StringIO(), messages) == 1
    assert "is the server running?" in messages.getvalue()


def test_check_is_a_command(tiny_target: Path, tiny_drafter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--target", str(tiny_target), "--drafter", str(tiny_drafter)]) == 0
    assert "mask tokens" in capsys.readouterr().out


def test_json_logs_are_one_object_for_each_line() -> None:
    import logging

    from service.logs import JsonFormatter

    record = logging.LogRecord("service.requests", logging.INFO, "", 0, "text", (), None)
    record.fields = {"status": 200, "path": "/x"}
    line = json.loads(JsonFormatter().format(record))
    assert (line["status"], line["path"], line["level"]) == (200, "/x", "info")
    plain = logging.LogRecord("service", logging.WARNING, "", 0, "a %s", ("word",), None)
    assert json.loads(JsonFormatter().format(plain))["message"] == "a word"
