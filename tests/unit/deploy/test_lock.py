"""The images' lock files pin every package with hashes, and satisfy pyproject.toml."""

import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
IMAGE = ROOT / "deploy/image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = {"service": PROJECT["dependencies"], "loadtest": PROJECT["optional-dependencies"]["loadtest"]}
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def entries(path: Path) -> list[str]:
    """Return one line per package, with the requirement and its hashes."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pinned(path: Path) -> dict[str, str]:
    requirements = [Requirement(entry.split(" ", 1)[0]) for entry in entries(path)]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


@pytest.mark.parametrize("image", WANTED)
def test_every_package_has_one_version_and_hashes(image: str) -> None:
    for entry in entries(IMAGE / f"{image}.lock"):
        requirement, *hashes = entry.split()
        assert re.fullmatch(r"[a-z0-9.-]+==[^*,;]+", requirement), requirement
        assert hashes, f"{requirement} has no hash"
        assert all(HASH.fullmatch(each) for each in hashes), requirement


@pytest.mark.parametrize("image", WANTED)
def test_what_pyproject_asks_for_is_locked_within_its_bounds(image: str) -> None:
    locked = pinned(IMAGE / f"{image}.lock") | pinned(IMAGE / "torch.txt")
    for wanted in map(Requirement, WANTED[image]):
        found = locked.get(canonicalize_name(wanted.name))
        assert found is not None, f"{wanted.name} is missing: make lock"
        assert wanted.specifier.contains(found), f"{wanted} is not satisfied by {found}: make lock"


def test_what_torch_asks_for_is_locked() -> None:
    """lock.toml repeats the requirements of torch's CPU build, because `make lock` can't read them from PyPI."""
    if not version("torch").endswith("+cpu"):
        pytest.skip("the installed torch is not the CPU build")
    locked = pinned(IMAGE / "service.lock")
    for wanted in map(Requirement, requires("torch") or ()):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), wanted


def test_the_lock_holds_nothing_of_cuda() -> None:
    assert not [name for name in pinned(IMAGE / "service.lock") if name.startswith(("nvidia", "cuda", "triton"))]
