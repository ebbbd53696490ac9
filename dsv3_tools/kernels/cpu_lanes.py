"""Vectors in compiled code: 16 float32 numbers at once, loaded from whatever weights are stored as.

LLVM makes vector code of a loop by itself where nothing but integers is carried from one element to the next.
Sums and maxima of floats over a part of a row are here values of the type `Floats`, which stay in registers;
LLVM splits them where the processor's vectors are shorter.

Elements are loaded 32 at a time, as a pair of vectors: the first and the last 16 of them or, since two INT4
codes share a byte, those at even places and those at odd ones. Both sides of a comparison have one order.

The bits of an e4m3 code, moved to their places in a float32, are 2**-120 of its number: subnormal codes, too,
become subnormal float32. Processors take some cycles more for those, of which weights have few: one in 8,000
if they are normal. Where all codes are equally likely `cpu_bits.decode_e4m3` is faster.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

__all__ = [
    "E4M3_UNIT",
    "MAX_E4M3_SCALE",
    "PAIR",
    "add_product",
    "any_above",
    "count_same",
    "differences_of_64",
    "e4m3_per_step",
    "e4m3_unit",
    "held",
    "hold",
    "larger",
    "largest_bits",
    "largest_lane",
    "load_pair",
    "magnitude",
    "no_bits",
    "power_below",
    "raise_bits",
    "smaller",
    "splat",
    "sum_lanes",
    "where_below",
]

PAIR = 32
"""Elements that are loaded at once."""

E4M3_UNIT = np.float32(2.0**-120)
"""What a loaded e4m3 code is a multiple of: a scale for it is 2**120 times the weight's."""

MAX_E4M3_SCALE = np.float32(2.0**7)
"""Smaller ones are finite when they are 2**120 times as large, and so is every product."""

_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic

_LANES = 16
_FLOAT = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_FLOATS, _WORDS = ir.VectorType(_FLOAT, _LANES), ir.VectorType(_I32, _LANES)
_EXPONENT = 0x7F80_0000
_TWO_POW_23 = 0x4B00_0000  # float32 from here on are neighbouring integers


class _Floats(types.Type):  # type: ignore[misc]
    """16 float32 numbers."""

    def __init__(self) -> None:
        super().__init__("float32 x 16")


class _Bits(types.Type):  # type: ignore[misc]
    """32 unsigned integers of `width` bits."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(f"uint{width} x 32")


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: _Floats) -> None:
        super().__init__(manager, kind, _FLOATS)


@register_model(_Bits)
class _BitsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: _Bits) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(kind.width), PAIR))


Floats = _Floats()

# ---------------------------------------------------------------------------------------- parts of the code


def _all(kind: Any, number: Any) -> Any:
    """Returns a number in every lane."""
    return ir.Constant(kind, [number] * kind.count)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    """Calls one of LLVM's functions of vectors of one type."""
    kind = arguments[0].type
    function = ir.FunctionType(kind, [kind] * len(arguments))
    full = f"llvm.{name}.v{kind.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, full), arguments)


def _splat(builder: Any, number: Any) -> Any:
    lane = builder.insert_element(_all(_FLOATS, 0.0), number, _I32(0))
    return builder.shuffle_vector(lane, lane, _all(_WORDS, 0))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _larger_bits(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _fold(builder: Any, vector: Any, both: Callable[[Any, Any, Any], Any]) -> Any:
    """Returns one number made of all lanes, halves first."""
    while (count := vector.type.count) > 1:
        low, high = (
            ir.Constant(ir.VectorType(_I32, count // 2), list(range(start, start + count // 2)))
            for start in (0, count // 2)
        )
        vector = both(
            builder,
            builder.shuffle_vector(vector, vector, low),
            builder.shuffle_vector(vector, vector, high),
        )
    return builder.extract_element(vector, _I32(0))


# -------------------------------------------------------------------------------------------------- loading


def _load(builder: Any, data: Any, at: Any, element: Any, count: int) -> Any:
    """Returns `count` elements of memory that need not be aligned."""
    pointer = builder.bitcast(builder.gep(data, [at]), ir.VectorType(element, count).as_pointer())
    return builder.load(pointer, align=1)


def _pick(builder: Any, vector: Any, *, alternating: bool) -> list[Any]:
    """Returns both vectors of a pair."""
    places = [
        range(start, PAIR, 2) if alternating else range(16 * start, 16 * start + 16) for start in (0, 1)
    ]
    return [builder.shuffle_vector(vector, vector, ir.Constant(_WORDS, list(place))) for place in places]


def _pair_of_e4m3(builder: Any, data: Any, at: Any, *, alternating: bool) -> list[Any]:
    if alternating:
        both = builder.zext(_load(builder, data, at, _I16, _LANES), _WORDS)
        tops = [builder.shl(both, _all(_WORDS, shift)) for shift in (24, 16)]
        words = [builder.ashr(top, _all(_WORDS, 4)) for top in tops]
    else:
        parts = _pick(builder, _load(builder, data, at, _I8, PAIR), alternating=False)
        words = [builder.shl(builder.sext(part, _WORDS), _all(_WORDS, 20)) for part in parts]
    return [builder.bitcast(builder.and_(word, _all(_WORDS, 0x87F0_0000)), _FLOATS) for word in words]


def _pair_of_bfloat16(builder: Any, data: Any, at: Any, *, alternating: bool) -> list[Any]:
    bits = _load(builder, data, at, _I16, PAIR)
    if alternating:
        both = builder.bitcast(bits, _WORDS)
        words = [builder.shl(both, _all(_WORDS, 16)), builder.and_(both, _all(_WORDS, 0xFFFF_0000))]
    else:
        parts = _pick(builder, bits, alternating=False)
        words = [builder.shl(builder.zext(part, _WORDS), _all(_WORDS, 16)) for part in parts]
    return [builder.bitcast(word, _FLOATS) for word in words]


def _pair_of_int8(builder: Any, data: Any, at: Any) -> list[Any]:
    parts = _pick(builder, _load(builder, data, at, _I8, PAIR), alternating=False)
    return [builder.sitofp(builder.sext(part, _WORDS), _FLOATS) for part in parts]


def _pair_of_int4(builder: Any, data: Any, at: Any, origin: Any) -> list[Any]:
    packed = builder.zext(_load(builder, data, at, _I8, _LANES), _WORDS)
    codes = [builder.and_(packed, _all(_WORDS, 15)), builder.lshr(packed, _all(_WORDS, 4))]
    words = [builder.or_(code, _all(_WORDS, _TWO_POW_23)) for code in codes]
    return [builder.fsub(builder.bitcast(word, _FLOATS), origin) for word in words]


@_intrinsic
def load_pair(_context: Any, array: Any, at: Any, other: Any, origin: Any) -> Any:
    """Returns the 32 elements from number `at` on, in the order in which `other` has to be loaded, too.

    Args:
        array: flat. uint8 is e4m3, loaded in its unit; uint16 BF16, uint32 float32, int8 a code. int32 are
            eight INT4 codes each, the first lowest.
        at: a multiple of 32.
        other: the other array.
        origin: 2**23 + zero point of INT4 codes, in every lane; else unused.
    """
    kind, alternating = array.dtype, types.int32 in (array.dtype, other.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        at = arguments[1]
        if kind == types.int32:
            codes = builder.bitcast(data, _I8.as_pointer())
            pair = _pair_of_int4(builder, codes, builder.lshr(at, at.type(1)), arguments[3])
        elif kind == types.int8:
            pair = _pair_of_int8(builder, data, at)
        elif kind == types.uint8:
            pair = _pair_of_e4m3(builder, data, at, alternating=alternating)
        elif kind == types.uint16:
            pair = _pair_of_bfloat16(builder, data, at, alternating=alternating)
        else:
            words = _pick(builder, _load(builder, data, at, _I32, PAIR), alternating=alternating)
            pair = [builder.bitcast(word, _FLOATS) for word in words]
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(Floats, 2)(array, at, other, origin), generate


def e4m3_unit(array: Any) -> Any:
    """Returns what loaded elements of an array are multiples of: `E4M3_UNIT` or 1."""
    raise NotImplementedError("compiled code only")


@overload(e4m3_unit, inline="always")
def _e4m3_unit_overload(array):  # type: ignore[no-untyped-def]
    unit = E4M3_UNIT if array.dtype == types.uint8 else np.float32(1)
    return lambda array: unit  # noqa: ARG005


# ----------------------------------------------------------------------------------------------- arithmetic


def _operation(build: Callable[..., Any]) -> Any:
    """Returns a function of vectors that returns one, made by `build(builder, *vectors)`."""

    def typed(_context: Any, *arguments: Any) -> Any:
        return Floats(*arguments), lambda _c, builder, _s, values: build(builder, *values)

    typed.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]  # numba counts its arguments
    return _intrinsic(typed)


def _masked(builder: Any, vector: Any, mask: int) -> Any:
    return builder.bitcast(builder.and_(builder.bitcast(vector, _WORDS), _all(_WORDS, mask)), _FLOATS)


def _e4m3_per_step(builder: Any, codes: Any) -> Any:
    exponent = builder.and_(builder.bitcast(codes, _WORDS), _all(_WORDS, _EXPONENT))
    exponent = _larger_bits(builder, exponent, _all(_WORDS, 1 << 23))
    return builder.bitcast(builder.sub(_all(_WORDS, (127 + 7 + 3) << 23), exponent), _FLOATS)


_add = _operation(lambda builder, a, b: builder.fadd(a, b))
_subtract = _operation(lambda builder, a, b: builder.fsub(a, b))
_multiply = _operation(lambda builder, a, b: builder.fmul(a, b))

larger = _operation(_larger)
"""The larger number in each lane."""

smaller = _operation(_smaller)
"""The smaller number in each lane."""

magnitude = _operation(lambda builder, vector: _call(builder, "fabs", vector))
"""The absolute number in each lane."""

add_product = _operation(lambda builder, total, a, b: _call(builder, "fmuladd", a, b, total))
"""total + a x b, rounded once or twice."""

power_below = _operation(lambda builder, vector: _masked(builder, vector, _EXPONENT))
"""The power of two next below each normal number's magnitude, else 0."""

e4m3_per_step = _operation(_e4m3_per_step)
"""1 / the distance of neighbours around loaded e4m3 codes, which is not in their unit."""

where_below = _operation(
    lambda builder, number, code, bound: builder.select(
        builder.fcmp_ordered("<", code, bound), number, _all(_FLOATS, 0.0)
    )
)
"""The number where a code is below a bound, else 0."""


def _overload_operator(symbol: Any, function: Any) -> None:
    @overload(symbol)
    def chosen(a, b):  # type: ignore[no-untyped-def]
        return (lambda a, b: function(a, b)) if a is Floats and b is Floats else None  # noqa: PLW0108


_overload_operator(operator.add, _add)
_overload_operator(operator.sub, _subtract)
_overload_operator(operator.mul, _multiply)


@_intrinsic
def held(_context: Any, array: Any, at: Any) -> Any:
    """Returns 16 numbers of a flat float32 array."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        return _load(builder, data, arguments[1], _FLOAT, _LANES)

    return Floats(array, at), generate


@_intrinsic
def hold(_context: Any, array: Any, at: Any, vector: Any) -> Any:
    """Writes 16 numbers into a flat float32 array."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), _FLOATS.as_pointer())
        builder.store(arguments[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, at, vector), generate


@_intrinsic
def any_above(_context: Any, vector: Any, bound: Any) -> Any:
    """Returns whether a number is above the one in the same lane."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = builder.bitcast(builder.fcmp_ordered(">", *arguments), ir.IntType(_LANES))
        return builder.icmp_unsigned("!=", lanes, ir.IntType(_LANES)(0))

    return types.boolean(vector, bound), generate


@_intrinsic
def splat(_context: Any, _number: Any) -> Any:
    """Returns a float32 in every lane."""
    return Floats(types.float32), lambda _c, builder, _s, arguments: _splat(builder, arguments[0])


@_intrinsic
def count_same(_context: Any, a: Any, b: Any) -> Any:
    """Returns in how many lanes the bits are equal."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        words = [builder.bitcast(vector, _WORDS) for vector in arguments]
        same = builder.bitcast(builder.icmp_unsigned("==", *words), ir.IntType(_LANES))
        return builder.zext(builder.ctpop(same), _I64)

    return types.int64(a, b), generate


@_intrinsic
def sum_lanes(_context: Any, vector: Any) -> Any:
    """Returns the sum of all lanes."""
    both = ir.IRBuilder.fadd
    return types.float32(vector), lambda _c, builder, _s, arguments: _fold(builder, arguments[0], both)


@_intrinsic
def largest_lane(_context: Any, vector: Any) -> Any:
    """Returns the largest lane."""
    return types.float32(vector), lambda _c, builder, _s, arguments: _fold(builder, arguments[0], _larger)


# ------------------------------------------------------------------------- magnitudes of what is not loaded


@_intrinsic
def no_bits(_context: Any, array: Any) -> Any:
    """Returns 32 zeros as wide as an array's elements."""
    kind = ir.VectorType(ir.IntType(array.dtype.bitwidth), PAIR)
    return _Bits(array.dtype.bitwidth)(array), lambda *_: ir.Constant(kind, None)


@_intrinsic
def raise_bits(_context: Any, largest: Any, array: Any, at: Any) -> Any:
    """Returns the larger ones of `largest` and of 32 elements' bits without their signs."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[1]).data
        bits = _load(builder, data, arguments[2], ir.IntType(largest.width), PAIR)
        size = builder.and_(bits, _all(bits.type, (1 << largest.width - 1) - 1))
        return _larger_bits(builder, size, arguments[0])

    return largest(largest, array, at), generate


@_intrinsic
def largest_bits(_context: Any, bits: Any) -> Any:
    """Returns the largest as uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        found = _fold(builder, arguments[0], _larger_bits)
        return found if bits.width == 32 else builder.zext(found, _I32)

    return types.uint32(bits), generate


# --------------------------------------------------------------------------------- 64 codes and their weights


def _has_byte_tables(context: Any) -> bool:
    """Whether the processor looks up 64 bytes in a table of 128 at once."""
    return "+avx512vbmi" in context.codegen().magic_tuple()[2].split(",")


def _bfloat16_by_table(builder: Any, codes: Any, table: Any) -> list[Any]:
    """Returns BF16 bits, 32 and 32: the table's bytes, with the codes' signs."""
    bytes_64 = codes.type
    parts = [_load(builder, table, _I64(64 * part), _I8, 64) for part in range(4)]
    look_up = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(bytes_64, [bytes_64] * 3), "llvm.x86.avx512.vpermi2var.qi.512"
    )
    # Bytes are interleaved within 128 bits: so that 0 ... 31 come out first, codes take turns by eights.
    turns = [8 * (turn // 2 + 4 * (turn % 2)) + byte for turn in range(8) for byte in range(8)]
    codes = builder.shuffle_vector(codes, codes, ir.Constant(ir.VectorType(_I32, 64), turns))
    low, high = (builder.call(look_up, [parts[half], codes, parts[half + 1]]) for half in (0, 2))
    high = builder.or_(high, builder.and_(codes, _all(bytes_64, 0x80)))
    found = []
    for half in (0, 8):
        both = [
            first + 16 * lane + half + byte for lane in range(4) for byte in range(8) for first in (0, 64)
        ]
        mixed = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, 64), both))
        found.append(builder.bitcast(mixed, ir.VectorType(_I16, PAIR)))
    return found


def _bfloat16_by_product(builder: Any, codes: Any, at: Any, scale: Any) -> list[Any]:
    """Returns BF16 bits, 32 and 32: products of codes and a scale, rounded to nearest even."""
    found = []
    for half in (0, PAIR):
        words = []
        for values in _pair_of_e4m3(builder, codes, builder.add(at, at.type(half)), alternating=False):
            bits = builder.bitcast(builder.fmul(values, scale), _WORDS)
            odd = builder.and_(builder.lshr(bits, _all(_WORDS, 16)), _all(_WORDS, 1))
            rounded = builder.add(builder.add(bits, _all(_WORDS, 0x7FFF)), odd)
            words.append(builder.trunc(builder.lshr(rounded, _all(_WORDS, 16)), ir.VectorType(_I16, _LANES)))
        found.append(
            builder.shuffle_vector(*words, ir.Constant(ir.VectorType(_I32, PAIR), list(range(PAIR))))
        )
    return found


@_intrinsic
def differences_of_64(_context: Any, codes: Any, words: Any, at: Any, table: Any, scale: Any) -> Any:
    """Returns a uint64 that is 0 if 64 e4m3 codes are numbers and their weights, rounded to BF16, `words`.

    Args:
        codes: flat, uint8.
        words: flat, uint16.
        at: the first one's number.
        table: uint8 `[256]`: of the magnitudes that codes 0 ... 127 stand for, in BF16, the low bytes, then
            the high ones.
        scale: what loaded codes are multiplied by.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = [
            context.make_array(kind)(context, builder, arguments[n]).data
            for n, kind in enumerate(signature.args)
            if isinstance(kind, types.Array)
        ]
        found = _load(builder, data[0], arguments[2], _I8, 64)
        size = builder.and_(found, _all(found.type, 0x7F))
        nan = builder.icmp_unsigned("==", size, _all(size.type, 0x7F))
        if _has_byte_tables(context):
            weights = _bfloat16_by_table(builder, found, data[2])
        else:
            weights = _bfloat16_by_product(builder, data[0], arguments[2], _splat(builder, arguments[4]))
        result = builder.bitcast(nan, _I64)
        for half, weight in zip((0, PAIR), weights, strict=True):
            expected = _load(builder, data[1], builder.add(arguments[2], _I64(half)), _I16, PAIR)
            differs = builder.bitcast(builder.icmp_unsigned("!=", weight, expected), _I32)
            result = builder.or_(result, builder.zext(differs, _I64))
        return result

    return types.uint64(codes, words, at, table, scale), generate
