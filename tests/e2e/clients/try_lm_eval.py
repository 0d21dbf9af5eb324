"""Run lm_eval's `local-completions` on local tasks: `python try_lm_eval.py URL PLAIN_URL`.

Log-likelihoods and greedy texts must be the same with speculation (URL), without it (PLAIN_URL), and from lm_eval's own
transformers backend; both with the tokenizer's files and with the server's tokenizer endpoints.
"""

import os
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="lm-eval-"))

import lm_eval
import requests
from lm_eval.tasks import TaskManager

TASK_FOLDER = Path(__file__).resolve().parent / "lm_eval_tasks"
TARGET = TASK_FOLDER.parents[3] / "models" / "target"
TASKS = ["choose_line", "whole_text", "write_lines"]
CONTEXT_TOKENS = 1024
LARGEST_DIFFERENCE = 2e-4  # nats, of a sum over some twenty tokens in float32

Scores = dict[str, list[Any]]


def evaluate(backend: str, **arguments: Any) -> Scores:
    """Return, by task, the model's answer for each document: log-likelihoods or a text."""
    tasks = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=tasks,
        bootstrap_iters=0,
        device="cpu",
    )
    for name in TASKS:
        print(f"  {backend}: {name} {results['results'][name]}")
    samples = {name: sorted(results["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}
    return {name: [sample["filtered_resps"] for sample in samples[name]] for name in TASKS}


def served(url: str, **arguments: Any) -> Scores:
    return evaluate(
        "local-completions",
        model="diffuspec-python",
        base_url=f"{url}/v1/completions",
        num_concurrent=4,
        max_length=CONTEXT_TOKENS,
        **arguments,
    )


def num_drafted(url: str) -> float:
    text = requests.get(f"{url}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(r"^vllm:spec_decode_num_draft_tokens_total\S* (\S+)", text, re.M))


def compare(what: str, scores: Scores, reference: Scores) -> None:
    """Assert that texts and greedy flags are equal, and log-likelihoods nearly so."""
    assert scores["write_lines"] == reference["write_lines"], (what, scores["write_lines"], reference["write_lines"])
    largest = 0.0
    for (score, is_greedy), (expected, expected_greedy) in zip(
        flattened(scores["choose_line"]), flattened(reference["choose_line"]), strict=True
    ):
        largest = max(largest, abs(score - expected))
        assert is_greedy == expected_greedy, what
    for (score,), (expected,) in zip(scores["whole_text"], reference["whole_text"], strict=True):
        largest = max(largest, abs(score - expected))
    assert largest < LARGEST_DIFFERENCE, f"{what}: log-likelihoods differ by {largest}"
    print(f"passed  lm_eval {version('lm_eval')} {what}: greedy texts equal, log-likelihoods within {largest:.1e}")


def flattened(answers: list[list[tuple[float, bool]]]) -> list[tuple[float, bool]]:
    return [answer for document in answers for answer in document]


def main(url: str, plain_url: str) -> None:
    os.chdir(TASK_FOLDER)  # the tasks name their data by a relative path
    files = {"tokenizer": str(TARGET), "tokenizer_backend": "huggingface"}
    before = num_drafted(url)
    speculative = served(url, **files)
    assert num_drafted(url) > before, "nothing was drafted: the comparison would say nothing"
    plain = served(plain_url, **files)
    assert num_drafted(plain_url) == 0
    compare("speculation on against off", speculative, plain)
    compare("the server's tokenizer against the files", served(url), speculative)
    reference = evaluate("hf", pretrained=str(TARGET), dtype="float32", max_length=CONTEXT_TOKENS)
    compare(f"against transformers {version('transformers')}", speculative, reference)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
