"""Replay the fuzzer's kept corpus at every test run, without the fuzzer."""

import importlib
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / "corpus"
TARGETS = ("requests", "detokenizer", "stops", "tool_calls")


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_was_ever_found_fails_again(name: str) -> None:
    target = importlib.import_module(f"tests.fuzz.{name}")
    for seed in target.SEEDS:
        target.check(seed)
    kept = sorted((CORPUS / name).iterdir())
    assert kept
    for file in kept:
        target.check(file.read_bytes())
    if hasattr(target, "close"):
        target.close()


def test_the_corpus_stays_small() -> None:
    files = [file for file in CORPUS.rglob("*") if file.is_file()]
    assert {file.parent.name for file in files} == set(TARGETS)
    assert sum(file.stat().st_size for file in files) < 200_000
    assert max(sum(file.parent.name == name for file in files) for name in TARGETS) <= 200
