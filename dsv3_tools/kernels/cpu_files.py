"""Rows of a file for compiled code, read outside Python's lock.

What a processor's L2 cache holds is read in ten microseconds: too few for Python to ask for the next rows in.
"""

from __future__ import annotations

from typing import Any

from numba import types

from dsv3_tools.kernels.jit import compiled

__all__ = ["IN_MEMORY", "fill", "rows_at"]

IN_MEMORY = (-1, 0)
"""The place, an open file's descriptor and an offset in it, of rows that are in no file."""

# The memory's address as a number: a pointer into the middle of an array would be a view of it.
_pread = types.ExternalFunction("pread", types.intp(types.intc, types.uintp, types.uintp, types.int64))


@compiled
def fill(place: Any, start: int, room: Any, nbytes: int) -> Any:
    """Reads bytes of a file into the start of an array; returns whether they were there.

    Args:
        place: descriptor and offset.
        start: the first byte from there on.
        room: where they go.
        nbytes: how many.
    """
    done, address = 0, room.ctypes.data
    while done < nbytes:
        count = _pread(place[0], address + done, nbytes - done, place[1] + start + done)
        if count <= 0:
            return False
        done += count
    return True


@compiled
def rows_at(values: Any, place: Any, first: int, count: int) -> Any:
    """Returns whether some rows could be read, and the rows.

    Args:
        values: all rows, if they are in memory, else room for `count` of them.
        place: where the first of all rows is.
        first: the first row that is wanted.
        count: how many are.
    """
    if place[0] < 0:
        return True, values[first : first + count]
    row_nbytes = values.shape[1] * values.itemsize
    return fill(place, first * row_nbytes, values, count * row_nbytes), values[:count]
