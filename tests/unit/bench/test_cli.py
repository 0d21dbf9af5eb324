import argparse
import json
from pathlib import Path

import pytest

from service.bench.arguments import add_arguments
from service.bench.cli import run
from service.bench.report import FORMAT


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def _small(tmp_path: Path, target: Path, *arguments: str) -> list[str]:
    common = [
        "--target",
        str(target),
        "--num-prompts",
        "4",
        "--prompt-tokens",
        "32",
        "--max-tokens",
        "12",
        "--warmup",
        "1",
    ]
    return [*common, "--json", str(tmp_path / "out" / "b.json"), "--html", str(tmp_path / "out" / "b.html"), *arguments]


def test_a_run_prints_a_table_and_writes_both_files(
    tmp_path: Path, tiny_target: Path, tiny_drafter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _small(tmp_path, tiny_target, "--drafter", str(tiny_drafter), "--cells", "free,default")
    assert run(_parse(*arguments, "--temperatures", "0,0.5", "--concurrency", "2")) == 0
    document = json.loads((tmp_path / "out" / "b.json").read_text())
    assert document["format"] == FORMAT
    assert [(entry["temperature"], entry["num_pairs"]) for entry in document["workloads"]] == [(0.0, 4), (0.5, 4)]
    for workload in document["workloads"]:
        assert [summary["contestant"] for summary in workload["summaries"]] == ["plain", "free", "default"]
        assert workload["mismatches"] == []
    assert (tmp_path / "out" / "b.html").read_text().startswith("<!doctype html>")
    printed = capsys.readouterr().out
    assert "greedy, concurrency 2: 4 batches of 2 prompts" in printed
    assert "temperature 0.5, concurrency 2" in printed


def test_an_empty_budget_still_reports_what_was_done(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _small(tmp_path, tiny_target, "--drafter", "none", "--temperatures", "0", "--budget-seconds", "0")
    assert run(_parse(*arguments)) == 0
    (workload,) = json.loads((tmp_path / "out" / "b.json").read_text())["workloads"]
    assert (workload["num_pairs"], workload["num_pairs_planned"]) == (1, 4)
    assert "Stopped early: the time budget of 0 s is used up." in capsys.readouterr().out


def test_own_prompts_are_taken_whole(tmp_path: Path, tiny_target: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "import os"}\n{"prompt": "def f(x):"}\n')
    arguments = _small(tmp_path, tiny_target, "--drafter", "none", "--temperatures", "0", "--prompts", str(path))
    assert run(_parse(*arguments)) == 0
    (workload,) = json.loads((tmp_path / "out" / "b.json").read_text())["workloads"]
    names = [name for entry in workload["passes"] if entry["contestant"] == "plain" for name in entry["prompts"]]
    assert names == ["prompts.jsonl:1", "prompts.jsonl:2"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "fastest"], "unknown cell 'fastest'"),
        (["--cells", "default"], "needs a diffusion drafter"),
        (["--max-tokens", "512"], "leaves no room for a prompt"),
        (["--prompts", "/nowhere.txt"], "cannot read prompts"),
        (["--prompt-source", "/nowhere"], "no Python file"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(_parse(*_small(tmp_path, tiny_target, "--drafter", "none"), *arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_parse(*_small(tmp_path, tmp_path, "--drafter", "none"))) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperatures", "3"],
        ["--temperatures", "hot"],
        ["--concurrency", "0"],
        ["--concurrency", "1.5"],
        ["--repeats", "-1"],
    ],
)
def test_impossible_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        _parse(*arguments)
    assert refusal.value.code == 2
    assert arguments[0] in capsys.readouterr().err
