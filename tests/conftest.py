"""Tiny checkpoints, shared by the tests of a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.checkpoints import write_block_drafter, write_checkpoint
from tests.near_ties import NearTies

settings.register_profile("unhurried", deadline=None)  # the first call of a kernel compiles it
settings.load_profile("unhurried")
torch.set_num_threads(1)  # with tiny matrices, more threads only wait for each other


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama."""
    folder = tmp_path_factory.mktemp("target")
    write_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def tiny_drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random block-diffusion drafter over the tiny target's vocabulary."""
    folder = tmp_path_factory.mktemp("drafter")
    write_block_drafter(folder)
    return folder


@pytest.fixture(scope="session")
def near_ties() -> Iterator[NearTies]:
    """Count near-ties over all tests of the session that compare greedy outputs; check the total at the end."""
    ties = NearTies()
    yield ties
    ties.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long version of the checks of the vLLM engine")
