"""One server over tiny models for all tests of the API that want real text, for each engine that is installed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from tests.integration.api_server import engine_app, serving

ENGINES = ("embedded", "vllm")


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: make test-vllm")
    return name


@pytest.fixture(scope="session")
def served_target(engine: str, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny target that `url` serves; vLLM's attention on a CPU needs wider heads."""
    if engine == "embedded":
        return tiny_target
    folder = tmp_path_factory.mktemp("served-target")
    write_checkpoint(folder, "llama", head_dim=32)
    return folder


@pytest.fixture(scope="session")
def url(engine: str, served_target: Path, tiny_drafter: Path) -> Iterator[str]:
    with serving(engine_app(engine, served_target, tiny_drafter)) as url:
        yield url


@pytest.fixture
def reproducible(engine: str) -> dict[str, Any]:
    """What a request must ask for so that its seed fixes its tokens: on vLLM draws depend on what was drafted."""
    return {} if engine == "embedded" else {"speculative": {"enabled": False}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn about each other."""
    for item in items:
        if "[vllm" in item.name:
            item.add_marker(pytest.mark.filterwarnings("default"))
