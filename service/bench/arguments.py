"""The command line of `diffuspec bench`."""

import argparse
from pathlib import Path

from service.bench.cells import CELLS

MIN_PAIRS = 4


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected comma-separated numbers, got {text!r}") from None


def _temperatures(text: str) -> list[float]:
    values = _numbers(text)
    if not all(0 <= value <= 2 for value in values):
        raise argparse.ArgumentTypeError(f"temperatures must be from 0 to 2, got {text!r}")
    return values


def _counts(text: str) -> list[int]:
    values = _numbers(text)
    if not all(value >= 1 and value == int(value) for value in values):
        raise argparse.ArgumentTypeError(f"expected whole numbers of at least 1, got {text!r}")
    return [int(value) for value in values]


def _count(text: str) -> int:
    (value,) = _counts(text)
    return value


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffuspec bench`."""
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--cells",
        help=f"comma-separated configurations: {', '.join(c.name for c in CELLS)}; "
        "append settings to change them: cps-fixed+refinement_steps=2; "
        "on vLLM: plain, ngram, suffix, free, default, garbage",
    )
    what.add_argument(
        "--engine", choices=["embedded", "vllm"], default="embedded", help="vllm: our drafter and vLLM's own methods"
    )
    what.add_argument("--all", action="store_true", help="every configuration")
    what.add_argument("--against", choices=["transformers"], help="also compare with transformers' generate")
    what.add_argument("--url", help="measure a running server with and without speculation, e.g. http://127.0.0.1:8000")
    what.add_argument("--api-key", help="for --url")
    models = parser.add_argument_group("models (default: the settings, including DIFFUSPEC_*, else the bundled pair)")
    models.add_argument("--config", type=Path, help="settings file")
    models.add_argument("--target", help="folder of the target")
    models.add_argument("--drafter", help="folder of the drafter, prompt-lookup, or none")
    models.add_argument("--ngram", help="folder of the n-gram model")
    models.add_argument("--threads", type=_count, help="CPU threads for torch")
    load_group = parser.add_argument_group("how much")
    load_group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="whole prompts: .jsonl, or text with blank lines between"
    )
    load_group.add_argument(
        "--prompt-source", type=Path, metavar="DIR", help="cut prompts from the Python files below this folder"
    )
    load_group.add_argument("--prompt-tokens", type=_count, default=192, help="length of cut prompts (192)")
    load_group.add_argument(
        "--num-prompts", type=_count, default=16, help=f"prompts per workload (16), at least {MIN_PAIRS} batches"
    )
    load_group.add_argument("--max-tokens", type=_count, default=128, help="tokens generated per prompt (128)")
    load_group.add_argument("--temperatures", type=_temperatures, default=[0.0, 0.5], help="e.g. 0,0.5,1.2 (0,0.5)")
    load_group.add_argument("--concurrency", type=_counts, default=[1], help="concurrent requests, e.g. 1,4,16 (1)")
    load_group.add_argument("--repeats", type=_count, default=1, help="measurements per prompt (1)")
    load_group.add_argument("--warmup", type=_count_or_none, default=3, help="warm-up batches per configuration (3)")
    load_group.add_argument("--seed", type=int, default=0, help="seed of the cut prompts and the random draws (0)")
    load_group.add_argument(
        "--budget-seconds", type=float, default=900.0, help="stop cleanly after about this many seconds (900)"
    )
    output = parser.add_argument_group("output, besides the printed table")
    output.add_argument("--json", type=Path, help="default: reports/bench-TIME.json")
    output.add_argument("--html", type=Path, help="default: reports/bench-TIME.html")
