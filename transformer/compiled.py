"""Compilation of inner loops with numba, the same way everywhere."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, without the interpreter lock; cached on disk unless no folder for the cache is writable.

    The cache notices a change of the file a function is defined in, but not of functions it calls in other files.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",  # divisions need no check for zero
        "fastmath": {"reassoc", "contract"},  # sums may be reordered, to vectorise; infinities and not-a-number stay
    }
    try:
        kernel: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no writable place: a read-only install, as in some containers
        kernel = numba.njit(**options)(function)
    return kernel
