"""vLLM in this process: one engine with our proposer, one without any, shared by the session."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_block_drafter, write_checkpoint

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn about each other."""
    for item in items:
        if "tests/vllm" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("default"))


@dataclass
class Run:
    """One prompt's continuation."""

    tokens: tuple[int, ...]
    finish_reason: str
    output: Any


class InProcess:
    """vLLM's `LLM` over the service's own engine arguments, and a way to its worker."""

    def __init__(self, settings: Any) -> None:
        from service.engine.vllm.config import TargetFacts, budget, engine_arguments, prepare_environment

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        prepare_environment(settings)
        from llvmlite.binding.ffi import lib
        from vllm import LLM

        # vLLM looks for its kernels in the `__dict__` of every object that a module holds. This process has loaded
        # llvmlite's library by then, unlike the service's worker, and that library takes `__dict__` for a C function.
        lib._fntab["__dict__"] = {}
        target = TargetFacts.from_folder(Path(settings.model.target), settings.model.dtype)
        arguments = engine_arguments(settings, target, budget(settings, target))
        del arguments["enable_log_requests"]
        self.settings = settings
        self.llm = LLM(**arguments)
        self.worker = self.llm.llm_engine.model_executor.driver_worker.worker
        self.vocabulary_size = target.vocabulary_size

    @property
    def guard(self) -> Any:
        return self.worker._guard

    @property
    def proposer(self) -> Any:
        return self.guard.proposer._proposer

    def use(self, pipeline: Any) -> None:
        """Draft with another pipeline from now on, as if nothing had ever failed."""
        self.proposer._pipeline.inner = pipeline
        self.guard.backoff.succeed()
        self.guard.num_failures = 0

    def run(self, prompts: list[list[int]], params: Any, batch: int | None = None) -> list[Run]:
        """Continue prompts, at most `batch` of them at the same time. params: one for all, or one for each."""
        runs: list[Run] = []
        many = params if isinstance(params, list) else [params] * len(prompts)
        size = batch or len(prompts)
        for begin in range(0, len(prompts), size):
            outputs = self.llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts[begin : begin + size]],
                many[begin : begin + size],
                use_tqdm=False,
            )
            runs += [
                Run(tuple(output.outputs[0].token_ids), output.outputs[0].finish_reason, output) for output in outputs
            ]
        return runs


def settings_for(**overrides: Any) -> Any:
    from service.settings import load_settings

    usual = {
        "model.engine": "vllm",
        "model.num_threads": 1,
        "scheduler.max_running": 16,
        "scheduler.prefix_cache": False,
    }
    return load_settings(overrides=usual | overrides)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tiny random target and drafter, with heads of a width that vLLM's CPU attention has."""
    target, drafter = tmp_path_factory.mktemp("vllm-target"), tmp_path_factory.mktemp("vllm-drafter")
    write_checkpoint(target, "llama", head_dim=32)
    write_block_drafter(drafter)
    return target, drafter


@pytest.fixture(scope="session")
def plain() -> InProcess:
    """The bundled target without speculation."""
    return InProcess(settings_for(**{"vllm.method": "none"}))


@pytest.fixture(scope="session")
def tiny(tiny_folders: tuple[Path, Path]) -> InProcess:
    """The tiny target with speculation, many requests at the same time."""
    target, drafter = tiny_folders
    names: dict[str, Any] = {"model.target": str(target), "model.drafter": str(drafter), "scheduler.max_running": 64}
    names["vllm.pipeline"] = "tests.vllm.pipelines:make_idle"
    return InProcess(settings_for(**names, **{"speculation.max_draft_tokens": 4}))


@pytest.fixture(scope="session")
def speculative() -> InProcess:
    """The bundled pair, with a pipeline that each test chooses."""
    return InProcess(settings_for(**{"speculation.max_draft_tokens": 8, "vllm.pipeline": "tests.vllm.pipelines:make"}))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to run the long version of a check."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def prompts(full: bool) -> list[list[int]]:
    """Prompts from held-out code."""
    from service.bench.prompts import cut_prompts, held_out_texts
    from service.wiring import build_tokenizer

    tokenizer = build_tokenizer(settings_for().model.target)
    texts = held_out_texts()
    cut = cut_prompts(texts, 50 if full else 6, 48, lambda text: tokenizer.encode(text, add_special_tokens=False), 0)
    return [list(map(int, prompt.tokens)) for prompt in cut]
