"""Compile inner loops with numba, the same way everywhere."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_ROOT = Path(__file__).resolve().parent.parent


def kernel_digest() -> str:
    """Return a hash of all files in the packages that have kernels: kernels use constants of other files, too."""
    digest = hashlib.sha256()
    packages = ("drafters", "transformer", "verifiers")
    for path in sorted(path for package in packages for path in (_ROOT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# numba's cache notices a change in the file that defines a function, but not in other files whose functions it calls:
# it would run stale machine code. So each state of the source files has its own cache folder.
numba.config.CACHE_DIR = str(
    Path(numba.config.CACHE_DIR or _ROOT / "transformer" / "__pycache__") / f"kernels-{kernel_digest()}"
)


def kernel_cache() -> Path:
    """Return the folder of machine code. It changes with the source files."""
    return Path(numba.config.CACHE_DIR)


def kept(path: Path, make: Callable[[], bytes]) -> bytes:
    """Return the content of a file, which is made and written if it is missing, and the folder is writable."""
    try:
        return path.read_bytes()
    except OSError:
        content = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)  # at once, so that no other process reads a part
    return content


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that makes no arrays. It runs without the interpreter lock, and is cached on disk if possible.

    References are not counted here (numba's `_nrt`): counting those of every array argument takes longer than a small
    function itself. numba refuses to make an array in such a function. It does not refuse to call a function that makes
    one, and that array would never be freed: a test checks all kernels for this.
    """
    return _compile(function, _nrt=False)


def allocating(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that makes arrays. It should be short, and call `compiled` functions for the work."""
    return _compile(function)


def _compile(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",  # no check for division by zero
        "fastmath": {"reassoc", "contract"},  # sums may be reordered, to vectorise; infinities and NaN are kept
        **more,
    }
    try:
        kernel: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no writable folder, as in some containers
        kernel = numba.njit(**options)(function)
    return kernel
