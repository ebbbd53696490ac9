"""Are both copies of a weight equal, and how many of their elements are not finite?

Kernels read and compare files as long as all is equal and finite. Where one stops, a part of the weight is
read here, which may raise an error, and looked at more closely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.conversion.buffers import as_array
from dsv3_tools.formats import Dense, FP8Block
from dsv3_tools.verify.sides import Side
from dsv3_tools.verify.stripes import STORED_ELEMENTS, Buffers, stripes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ROOM_NBYTES", "common_dtype", "count_if_equal", "rows_at_once"]

ROOM_NBYTES = 1 << 17
"""Bytes that kernels read at once from the smaller side: long enough for the system, and in L2 cache with the
other side's."""

_PIECE_NBYTES = 1 << 26  # between two looks at whether to stop


def count_if_equal(
    reference: Side,
    candidate: Side,
    how: str,
    shape: tuple[int, ...],
    buffers: Buffers,
    check: Callable[[], None],
) -> int | None:
    """Returns how many elements are not finite; None if the copies differ.

    Args:
        reference: one copy.
        candidate: the other.
        how: `expectations.Expectation.equality`.
        shape: the weight's.
        buffers: memory of the worker.
        check: raises if the work is to end.
    """
    if how == "bytes":
        return _count_if_equal_bytes(reference, candidate, buffers, check)
    count = 0
    for top, height in stripes(shape, (reference.format, candidate.format), STORED_ELEMENTS):
        check()
        if _hold_equal_weights(reference, candidate, top, height):
            continue
        for part in stripes(shape, (reference.format, candidate.format), within=(top, height)):
            check()
            found = _count_if_decoded_equal(reference, candidate, *part)
            if found is None:
                return None
            count += found
    return count


def common_dtype(reference: Side, candidate: Side) -> str:
    """Returns the type in which both sides are equal: the narrower one of those that are not quantized."""
    dense = [side.format.dtype for side in (candidate, reference) if isinstance(side.format, Dense)]
    return min(dense, key=lambda dtype: DTYPES[dtype].bits, default="F32")


def rows_at_once(*sides: Side) -> int:
    """Returns how many rows kernels should read at once."""
    return max(1, ROOM_NBYTES // min(side.row_nbytes for side in sides))


def _count_if_equal_bytes(
    reference: Side, candidate: Side, buffers: Buffers, check: Callable[[], None]
) -> int | None:
    count = 0
    for (ours, nbytes), (theirs, _) in zip(reference.part_sizes(), candidate.part_sizes(), strict=True):
        dtype = candidate.format.code_dtype if theirs == candidate.format.weight_part else "U8"
        start = 0
        while start < nbytes:
            check()
            size = min(_PIECE_NBYTES, nbytes - start)
            reference.read_ahead(ours, start, size)
            candidate.read_ahead(theirs, start, size)
            places = reference.place(ours, start), candidate.place(theirs, start)
            equal = _equal_nbytes(places, size, dtype, buffers)
            start += equal
            if equal == size:
                continue
            size = min(ROOM_NBYTES, nbytes - start)
            found = _count_if_same(
                reference.read_bytes(ours, start, size), candidate.read_bytes(theirs, start, size), dtype
            )
            if found is None:
                return None
            count, start = count + found, start + size
    return count


def _equal_nbytes(
    places: tuple[tuple[int, int], tuple[int, int]], nbytes: int, dtype: str, buffers: Buffers
) -> int:
    from dsv3_tools.kernels.cpu_equal import equal_nbytes

    rooms = [buffers.tensor(f"room {n}", "U64", (ROOM_NBYTES // 8,)).numpy() for n in range(2)]
    return equal_nbytes(places, rooms, nbytes, dtype)


def _count_if_same(ours: NDArray[Any], theirs: NDArray[Any], dtype: str) -> int | None:
    """Returns how many of the bytes' elements are not finite; None if the bytes differ."""
    from dsv3_tools.kernels.cpu_equal import first_difference
    from dsv3_tools.kernels.nonfinite import count_nonfinite

    return None if first_difference(ours, theirs) >= 0 else count_nonfinite(theirs, dtype)


def _hold_equal_weights(reference: Side, candidate: Side, top: int, height: int) -> bool:
    """Whether rows of BF16 weights are finite and those of the other side's FP8 codes."""
    from dsv3_tools.kernels.cpu_equal import are_equal_weights

    dense, fp8 = (reference, candidate) if isinstance(reference.format, Dense) else (candidate, reference)
    if dense.format != Dense("BF16") or not isinstance(fp8.format, FP8Block):
        return False
    weights, codes = (side.coded(top, height, rows_at_once(dense, fp8)) for side in (dense, fp8))
    assert weights is not None
    assert codes is not None
    return are_equal_weights(codes, weights, height)


def _count_if_decoded_equal(reference: Side, candidate: Side, top: int, height: int) -> int | None:
    from dsv3_tools.kernels.cpu_equal import first_difference

    dtype = common_dtype(reference, candidate)
    ours, count = reference.decode(reference.read(top, height), dtype)
    theirs, more = candidate.decode(candidate.read(top, height), dtype)
    return None if first_difference(as_array(ours), as_array(theirs)) >= 0 else max(count, more)
