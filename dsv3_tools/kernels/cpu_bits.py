"""What the CPU kernels share: views of tensors, checks of arguments, single numbers as bits, FP8 decoding.

Types: numba widens integers to 64 bits, which quarters the vector speed, hence a `uint32(...)`
around each operation. `jit.cached` sees to it that a change of this file is noticed on disk as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from dsv3_tools.errors import FormatError
from dsv3_tools.kernels.jit import compiled, inlined

__all__ = [
    "BITS",
    "INFINITY",
    "MAGNITUDE",
    "NAN",
    "REBIAS",
    "SAFE_SCALE",
    "as_bytes",
    "as_float32",
    "as_uint32",
    "check_tensors",
    "count_blocks",
    "decode_e4m3",
    "has_nan_code",
    "narrow",
    "round_to_bfloat16",
    "widen",
    "without_sign",
]

float32, uint8, uint16, uint32 = np.float32, np.uint8, np.uint16, np.uint32

MAGNITUDE = uint32(0x7FFF_FFFF)
INFINITY = uint32(0x7F80_0000)
NAN = uint32(0x7FC0_0000)
REBIAS = uint32(120)  # exponent bias of float32 (127) - that of e4m3 (7)
SAFE_SCALE = float32(2.0**119)  # 448 x 2**119 is under BF16's largest number: no overflow below

# Views of torch storage as the unsigned integers that the kernels work on.
BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}


def as_bytes(code: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns a view of one-byte elements as uint8."""
    return code.view(torch.uint8).numpy()


def count_blocks(where: str, shape: Sequence[int], block_size: tuple[int, int]) -> tuple[int, ...]:
    """Returns how many blocks there are along either axis.

    Raises:
        FormatError: `shape` has not two axes or a block has no size.
    """
    if len(shape) != 2 or min(block_size) < 1:
        raise FormatError(
            f"{where}: codes of {tuple(shape)} in blocks of {block_size}, expected "
            "[rows, columns] and positive block sizes"
        )
    return tuple(-(-size // block) for size, block in zip(shape, block_size, strict=True))


def check_tensors(where: str, *expected: tuple[str, Tensor, Sequence[int], tuple[torch.dtype, ...]]) -> None:
    """Checks (name, tensor, shape, allowed dtypes) of each tensor.

    Raises:
        FormatError: the kernels would read or write outside of a tensor.
    """
    for name, tensor, shape, allowed in expected:
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in allowed or not tensor.is_contiguous():
            raise FormatError(
                f"{where}: {name} of {tuple(tensor.shape)} {tensor.dtype} with strides "
                f"{tensor.stride()}, expected contiguous {tuple(shape)} {' or '.join(map(str, allowed))}"
            )


def _to_float32(_context: Any, _bits: Any) -> Any:
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


def _to_uint32(_context: Any, _number: Any) -> Any:
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


# `Any`, since numba's own annotation asks callers for the context.
as_float32: Any = intrinsic(_to_float32)  # the float32 with the bits of a uint32
as_uint32: Any = intrinsic(_to_uint32)  # the bits of a float32


def widen(bits: Any) -> Any:
    """Returns the float32 bits of BF16 bits (uint16) or of float32 bits (uint32, unchanged)."""
    raise NotImplementedError("compiled code only")


@overload(widen, inline="always")
def _widen_overload(bits):  # type: ignore[no-untyped-def]  # numba wants them bare
    if bits == types.uint16:
        return lambda bits: uint32(uint32(bits) << uint32(16))
    return lambda bits: bits


def narrow(bits: Any, row: Any) -> Any:
    """Returns float32 bits rounded to nearest even to BF16 if `row` holds uint16, else unchanged."""
    raise NotImplementedError("compiled code only")


@overload(narrow, inline="always")
def _narrow_overload(bits, row):  # type: ignore[no-untyped-def]  # noqa: ARG001  (numba matches names)
    if row.dtype == types.uint16:
        return lambda bits, row: uint16(round_to_bfloat16(bits) >> uint32(16))  # noqa: ARG005
    return lambda bits, row: bits  # noqa: ARG005


def without_sign(bits: Any) -> Any:
    """Returns BF16 or float32 bits without the sign: ordered like the magnitudes they stand for."""
    raise NotImplementedError("compiled code only")


@overload(without_sign, inline="always")
def _without_sign_overload(bits):  # type: ignore[no-untyped-def]
    if bits == types.uint16:
        return lambda bits: uint16(bits & uint16(0x7FFF))
    return lambda bits: uint32(bits & MAGNITUDE)


@inlined
def round_to_bfloat16(bits: Any) -> Any:
    """Returns the bits of the BF16 number nearest to a float32 that is not NaN; lower half unspecified."""
    odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
    return uint32(uint32(bits + uint32(0x7FFF)) + odd)


@inlined
def decode_e4m3(code: Any) -> Any:
    """Returns the float32 of an e4m3 code; 0x7F and 0xFF, which are NaN, come out as +-480."""
    magnitude = uint32(code & uint8(0x7F))
    normal = as_float32(uint32(uint32(magnitude << uint32(20)) + uint32(REBIAS << uint32(23))))
    subnormal = float32(np.int32(magnitude)) * float32(2.0**-9)
    value = subnormal if magnitude < uint32(8) else normal
    return as_float32(uint32(as_uint32(value) | uint32(uint32(code & uint8(0x80)) << uint32(24))))


@compiled
def has_nan_code(codes: Any) -> Any:
    """Returns whether an e4m3 code of a row is NaN."""
    largest = uint8(0)
    for j in range(codes.size):
        largest = max(largest, uint8(codes[j] & uint8(0x7F)))
    return largest == uint8(0x7F)
