"""Compilation of the CPU kernels: outside the GIL, IEEE arithmetic, kept on disk where there is a place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from numba import njit

__all__ = ["cached", "compiled", "inlined"]

_F = TypeVar("_F", bound=Callable[..., Any])

# `error_model="numpy"` divides as IEEE 754 does; numba's default tests every divisor for zero, which
# does not vectorize (0.5 GB/s instead of 5). fastmath stays off: one rounding per operation.
compiled: Callable[[_F], _F] = njit(nogil=True, error_model="numpy")
inlined: Callable[[_F], _F] = njit(nogil=True, error_model="numpy", forceinline=True)


def cached(function: _F) -> _F:
    """Compiles a function that Python calls; kept on disk, for its compilation takes seconds.

    numba's cache on disk is fresh as long as the file of `function` is, whatever happens to other files that
    it calls into. So the digest of all files that may hold such code becomes part of the name that numba
    keeps it under: compiled code may call compiled code of its own file and of `cpu_*.py`, no other.
    """
    function.__qualname__ += f"_{_digest()}"
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to write: an installation that is read-only, in a container with no home
        return compiled(function)


@cache
def _digest() -> str:
    """Returns the start of the SHA-256 of this file and of each `cpu_*.py` beside it."""
    sha256 = hashlib.sha256()
    folder = resources.files(__package__)  # a folder or a place in a zip archive
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name == "jit.py" or fnmatch(file.name, "cpu_*.py"):
            sha256.update(file.read_bytes())
    return sha256.hexdigest()[:16]
