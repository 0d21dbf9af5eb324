"""Compilation of inner loops with numba, the same way everywhere."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_ROOT = Path(__file__).resolve().parent.parent


def kernel_digest() -> str:
    """A hash of all files of the packages that have kernels: these take constants from others, too."""
    digest = hashlib.sha256()
    packages = ("drafters", "transformer", "verifiers")
    for path in sorted(path for package in packages for path in (_ROOT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# numba's cache notices a change of the file a function is defined in, but not of functions it calls in other files, and
# would go on running stale machine code: so each state of the kernels has a folder of its own.
numba.config.CACHE_DIR = str(
    Path(numba.config.CACHE_DIR or _ROOT / "transformer" / "__pycache__") / f"kernels-{kernel_digest()}"
)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, without the interpreter lock; cached on disk unless no folder for the cache is writable.

    For functions that make no arrays: references are not counted (numba's `_nrt`). Else every call counts those to each
    array that it is given, up and down, and a small function takes less time than that. numba refuses to make an array
    here, but not to call a function that does, whose arrays would never be freed: a test reads all kernels for that.
    """
    return _compile(function, _nrt=False)


def allocating(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, for functions that make arrays: best short ones around others that do the work."""
    return _compile(function)


def _compile(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",  # divisions need no check for zero
        "fastmath": {"reassoc", "contract"},  # sums may be reordered, to vectorise; infinities and not-a-number stay
        **more,
    }
    try:
        kernel: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no writable place: a read-only install, as in some containers
        kernel = numba.njit(**options)(function)
    return kernel
