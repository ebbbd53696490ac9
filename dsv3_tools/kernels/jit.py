"""Compilation of the CPU kernels: outside the GIL, IEEE arithmetic, kept on disk where there is a place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

__all__ = ["cached", "compiled", "inlined"]

_F = TypeVar("_F", bound=Callable[..., Any])

# `error_model="numpy"` divides as IEEE 754 does; numba's default tests every divisor for zero, which
# does not vectorize (0.5 GB/s instead of 5). fastmath stays off: one rounding per operation.
compiled: Callable[[_F], _F] = njit(nogil=True, error_model="numpy")
inlined: Callable[[_F], _F] = njit(nogil=True, error_model="numpy", forceinline=True)


def cached(function: _F) -> _F:
    """Compiles a function that Python calls; kept on disk, for its compilation takes seconds."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to write: an installation that is read-only, in a container with no home
        return compiled(function)
