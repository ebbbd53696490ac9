"""The numba kernels give the bytes of `reference_integer.py`, for every layout, number, scale and shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_tools import kernels
from dsv3_tools.errors import FormatError
from dsv3_tools.kernels import cpu_int4, reference, reference_integer

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
INT32 = torch.int32
BITS = {BF16: torch.int16, torch.float32: torch.int32}
SOURCES = [BF16, torch.float16, torch.float32, FP8]
BLOCK_SIZES = [(128, 128), (64, 32), (1, 128), (3, 5), (200, 1100)]
SHAPES = [(1, 8), (129, 264), (576, 128), (2, 7168), (1, 18432)]
SCALES = [
    *(
        1.0,
        2.0**-13,
        2.0**118,
        math.nextafter(2.0**119, 0.0),
        2.0**119,
        2.0**120,
        3.4e38,
        2.0**-126,
        2.0**-140,
    ),
    *(
        2.0**-149,
        2.0**-128,
        math.nextafter(2.0**-128, 0.0),
        0.0,
        -0.0,
        -0.00037,
        -3.0e38,
        math.inf,
        -math.inf,
    ),
    *(math.nan, 0.00021437),
]


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Compares bits; shows the first difference's coordinate and both values."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    bits = BITS.get(got.dtype, got.dtype)
    a, b = got.view(bits), expected.view(bits)
    if not torch.equal(a, b):
        where = tuple((a != b).nonzero()[0].tolist())
        pytest.fail(
            f"{what}: {int((a != b).sum())} of {a.numel()} differ, first at {where}: "
            f"got {got[where].item()!r} ({int(a[where]):#x}), "
            f"expected {expected[where].item()!r} ({int(b[where]):#x})"
        )


def num_nonfinite(values: Tensor) -> int:
    return int((~values.float().isfinite()).sum())


def num_blocks(shape: Sequence[int], block_size: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def random_bits(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Returns numbers of all magnitudes: subnormal, huge, infinite and NaN ones among them."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (shape[0], shape[1] * nbytes), generator=generator, dtype=torch.uint8)
    return data.view(dtype)


def random_weight(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return (values * 60).clamp(-448, 448).to(FP8) if dtype == FP8 else values.mul_(0.02).to(dtype)


def random_scale(shape: Sequence[int], seed: int) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)) * 4e-4 + 1e-5


class Source:
    """A weight as the kernels take it, and the float weight that they must act on."""

    def __init__(
        self,
        weight: Tensor,
        fp8_scale: Tensor | None = None,
        fp8_block_size: tuple[int, int] = (128, 128),
    ) -> None:
        self.weight, self.fp8_scale, self.fp8_block_size = weight, fp8_scale, fp8_block_size
        self.values = weight
        if fp8_scale is not None:
            self.values = reference.dequantize_fp8_block(
                weight, fp8_scale, block_size=fp8_block_size, dtype=torch.float32
            )
        self.options = {
            "fp8_scales": None if fp8_scale is None else [fp8_scale],
            "fp8_block_size": fp8_block_size,
        }


def make_source(
    shape: Sequence[int],
    seed: int,
    dtype: torch.dtype,
    *,
    wild: bool = False,
    fp8_block_size: tuple[int, int] = (128, 128),
) -> Source:
    weight = (random_bits if wild else random_weight)(shape, seed, dtype)
    if dtype != FP8:
        return Source(weight)
    blocks = num_blocks(shape, fp8_block_size)
    scale = random_bits(blocks, seed + 1, torch.float32) if wild else random_scale(blocks, seed)
    return Source(weight, scale, fp8_block_size)


def check_int8_block(source: Source, block_size: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    shape = source.weight.shape
    codes = torch.full(shape, 55, dtype=torch.int8)
    scale = torch.full(num_blocks(shape, block_size), 7.0)
    counts = kernels.quantize_int8_block_into(
        [source.weight], [codes], [scale], block_size=block_size, **source.options
    )
    fp8_scale = source.fp8_scale if block_size == source.fp8_block_size else None
    expected = reference_integer.quantize_int8_block(
        source.values, block_size=block_size, fp8_scale=fp8_scale
    )
    assert_same(scale, expected[1], "scale")
    assert_same(codes, expected[0], "codes")
    assert counts.dtype == torch.int32
    assert counts.tolist() == [num_nonfinite(source.values)]
    return codes, scale


def check_int8_channel(source: Source) -> tuple[Tensor, Tensor]:
    shape = source.weight.shape
    codes = torch.full(shape, 55, dtype=torch.int8)
    scale = torch.full((shape[0], 1), 7.0)
    counts = kernels.quantize_int8_channel_into([source.weight], [codes], [scale], **source.options)
    expected = reference_integer.quantize_int8_channel(source.values)
    assert_same(scale, expected[1], "scale")
    assert_same(codes, expected[0], "codes")
    assert counts.tolist() == [num_nonfinite(source.values)]
    return codes, scale


def check_int4(
    source: Source, group_size: int, *, symmetric: bool = True, search: str = "mse"
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, columns = source.weight.shape
    packed = torch.full((rows, columns // 8), 0x55555555, dtype=INT32)
    scale = torch.full((rows, columns // group_size), 7.0, dtype=BF16)
    zero = None if symmetric else torch.full(scale.shape, 99, dtype=torch.uint8)
    counts = kernels.quantize_int4_group_into(
        [source.weight],
        [packed],
        [scale],
        None if zero is None else [zero],
        search=search,
        **source.options,
    )
    expected = reference_integer.quantize_int4_group(
        source.values, group_size=group_size, symmetric=symmetric, search=search
    )
    assert_same(scale, expected[1], "scale")
    if zero is not None and expected[2] is not None:
        assert_same(zero, expected[2], "zero")
    assert_same(packed, expected[0], "packed")
    assert counts.dtype == torch.int32
    assert counts.tolist() == [num_nonfinite(source.values)]
    return packed, scale, zero


def check_dequantize_int8(codes: Tensor, scale: Tensor, block_size: tuple[int, int] | None = None) -> None:
    for dtype in BITS:
        out = torch.full(codes.shape, 7.0, dtype=dtype)
        if block_size is None:
            counts = kernels.dequantize_int8_channel_into([codes], [scale], [out])
            expected = reference_integer.dequantize_int8_channel(codes, scale, dtype=dtype)
        else:
            counts = kernels.dequantize_int8_block_into([codes], [scale], [out], block_size=block_size)
            expected = reference_integer.dequantize_int8_block(
                codes, scale, block_size=block_size, dtype=dtype
            )
        assert_same(out, expected, "weight")
        assert counts.tolist() == [num_nonfinite(expected)]


def check_dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    for dtype in BITS:
        out = torch.full((packed.shape[0], packed.shape[1] * 8), 7.0, dtype=dtype)
        zeros = None if zero is None else [zero]
        counts = kernels.dequantize_int4_group_into([packed], [scale], zeros, [out])
        expected = reference_integer.dequantize_int4_group(packed, scale, zero, dtype=dtype)
        assert_same(out, expected, "weight")
        assert counts.dtype == torch.int32
        assert counts.tolist() == [num_nonfinite(expected)]


def test_a_wrong_bit_is_found() -> None:
    """The comparison that all tests lean on tells numbers apart that are equal as numbers."""
    with pytest.raises(pytest.fail.Exception, match=r"1 of 2 differ, first at \(1,\)"):
        assert_same(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0]), "zeros")


# ------------------------------------------------------------------------------------------------ quantize


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    source = make_source(shape, 1, dtype)
    for block_size in BLOCK_SIZES:
        check_int8_block(source, block_size)
    check_int8_channel(source)
    for group_size in (8, 32, 64, 128):
        if shape[1] % group_size == 0:
            for symmetric in (True, False):
                for search in ("absmax", "mse"):
                    check_int4(source, group_size, symmetric=symmetric, search=search)


@pytest.mark.parametrize("columns", [24, 40, 88, 136, 200, 264 * 3])
def test_group_sizes_that_fill_no_vector(columns: int) -> None:
    source = make_source((5, columns), 2, torch.float32)
    for size in (8, 24, 40, 88, 136, 200):
        if columns % size == 0:
            check_int4(source, size)
            check_int4(source, size, symmetric=False)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_quantize_every_bfloat16(group_size: int) -> None:
    """All 65,536 numbers, NaN and infinities among them, in groups of like and of unlike magnitude."""
    every = torch.arange(65536, dtype=INT32).to(torch.uint16).view(BF16)
    shuffled = every[torch.randperm(65536, generator=torch.Generator().manual_seed(5))]
    for values in (every, shuffled):
        source = Source(values.view(64, 1024))
        for symmetric in (True, False):
            for search in ("absmax", "mse"):
                check_int4(source, group_size, symmetric=symmetric, search=search)
        check_int8_block(source, (1, group_size))
        check_int8_channel(source)


@pytest.mark.parametrize("fp8_scale", SCALES, ids=str)
def test_quantize_every_fp8_code_with_odd_scales(fp8_scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = torch.where((codes & 0x7F) == 0x7F, 0x35, codes)
    for some in (codes, finite, finite.flip(0)):
        source = Source(some.view(FP8).repeat(3, 2), torch.tensor([[fp8_scale, 1e-4, fp8_scale, 0.0]]))
        check_int8_block(source)
        check_int8_block(source, (2, 200))
        check_int8_channel(source)
        for symmetric in (True, False):
            check_int4(source, 128, symmetric=symmetric)
            check_int4(source, 32, symmetric=symmetric, search="absmax")


def test_quantize_near_every_rounding_boundary() -> None:
    """The largest magnitude makes the scale 1: weights hit codes, midpoints and their neighbours."""
    for limit, low, check in (
        (127.0, -127.0, lambda source: check_int8_channel(source)[1]),
        (7.5, -7.5, lambda source: check_int4(source, 256, search="absmax")[1]),
    ):
        points = torch.arange(low, limit + 0.25, 0.5)
        below, above = (points.nextafter(torch.tensor(end)) for end in (-1e9, 1e9))
        values = torch.cat([points, below, above]).clamp(low, limit)
        values = torch.nn.functional.pad(values, (0, -values.numel() % 256), value=limit)
        scale = check(Source(values.view(-1, 256) if limit < 8 else values[None]))
        assert scale.unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_quantize_not_finite(dtype: torch.dtype) -> None:
    source = make_source((300, 256), 6, dtype)
    weight = source.weight.clone()
    odd = [(0, 0), (127, 128), (299, 255), *((130, j) for j in range(10, 20))]
    for i, where in enumerate(odd):
        number = math.nan if dtype == FP8 else (math.nan, math.inf, -math.inf)[i % 3]
        weight[where] = number
    weight[200] = math.nan
    again = Source(weight, source.fp8_scale)
    codes, _ = check_int8_block(again)
    assert all(codes[where] == 0 for where in odd)
    codes, scale = check_int8_channel(again)
    assert scale[200] == 1.0
    assert num_nonfinite(again.values) == len(odd) + 256
    for symmetric in (True, False):
        packed, scale4, zero = check_int4(again, 64, symmetric=symmetric)
        back = reference_integer.dequantize_int4_group(packed, scale4, zero)
        assert all(back[where] == 0 for where in odd)


@pytest.mark.parametrize("magnitude", [0.0, 2.0**-149, 2.0**-130, 2.0**-126, 2.0**-123, 2.0**-119, 3e38])
def test_quantize_zeros_subnormal_and_huge_groups(magnitude: float) -> None:
    values = torch.randn(16, 512, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    values[:, ::32], values[3], values[5, :64] = 1.0, -0.0, 0.0
    for weight in (values * magnitude, (values * magnitude).to(BF16), values.abs() * -magnitude):
        source = Source(weight)
        _, scale = check_int8_channel(source)
        assert scale[3] == 1.0
        check_int8_block(source, (3, 128))
        for group_size in (32, 128):
            for symmetric in (True, False):
                check_int4(source, group_size, symmetric=symmetric, search="absmax")
                _, scale4, _ = check_int4(source, group_size, symmetric=symmetric)
                assert (scale4[3] == 1.0).all()


def test_scales_around_the_smallest_normal() -> None:
    """Some of the scales that the search tries are below the smallest, some are not."""
    steps = torch.arange(0.5, 2.0, 0.01, dtype=torch.float64)[:, None]
    values = torch.randn(1, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64).clamp(-1, 1)
    values[0, 0] = 1.0
    for full in (7.5, 15.0, 127.0):
        source = Source((values * steps * full * 2.0**-126).float())
        check_int4(source, 64)
        check_int4(source, 64, symmetric=False)
        check_int8_channel(source)


def test_groups_of_one_sign() -> None:
    values = random_weight((8, 256), 5, torch.float32).abs()
    for weight in (values, -values, values + 5, -values - 5):
        _, _, zero = check_int4(Source(weight), 64, symmetric=False)
        assert zero is not None
        assert zero.max() == (0 if weight[0, 0] > 0 else 15)


def test_int8_takes_four_times_the_fp8_scale_where_that_is_better() -> None:
    """Both scales are chosen in some block, so both ways are tested."""
    weight = random_weight((256, 256), 8, torch.float32)
    codes, scale = reference.quantize_fp8_block(weight)
    codes[:128, :128] = (weight[:128, :128] * 4.0).to(FP8)  # small codes only: a quarter of the range
    _, chosen = check_int8_block(Source(codes, scale))
    aligned = chosen == scale * 4.0
    assert not aligned[0, 0]
    assert aligned.sum() == aligned.numel() - 1
    # Other blocks than those of FP8: no choice.
    _, chosen = check_int8_block(Source(codes, scale), (64, 128))
    assert not (chosen == scale.repeat_interleave(2, 0) * 4.0).any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    block_size=st.sampled_from(BLOCK_SIZES),
    fp8_block_size=st.sampled_from([(128, 128), (64, 32), (3, 5)]),
    dtype=st.sampled_from(SOURCES),
    wild=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int8_property(
    *,
    rows: int,
    columns: int,
    block_size: tuple[int, int],
    fp8_block_size: tuple[int, int],
    dtype: torch.dtype,
    wild: bool,
    seed: int,
) -> None:
    source = make_source((rows, columns), seed, dtype, wild=wild, fp8_block_size=fp8_block_size)
    check_int8_block(source, block_size)
    check_int8_block(source, fp8_block_size)
    check_int8_channel(source)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    group_size=st.sampled_from([8, 32, 48, 64, 128, 256]),
    fp8_block_size=st.sampled_from([(128, 128), (3, 5)]),
    dtype=st.sampled_from(SOURCES),
    symmetric=st.booleans(),
    search=st.sampled_from(["mse", "absmax"]),
    wild=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int4_property(
    *,
    rows: int,
    groups: int,
    group_size: int,
    fp8_block_size: tuple[int, int],
    dtype: torch.dtype,
    symmetric: bool,
    search: str,
    wild: bool,
    seed: int,
) -> None:
    shape = (rows, groups * group_size)
    source = make_source(shape, seed, dtype, wild=wild, fp8_block_size=fp8_block_size)
    check_int4(source, group_size, symmetric=symmetric, search=search)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=64),
    group_size=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
)
def test_hostile_numbers(*, numbers: list[float], group_size: int, symmetric: bool) -> None:
    row = torch.tensor(numbers).repeat(-(-128 // len(numbers)))[:128]
    source = Source(torch.stack([row, row.flip(0)]))
    check_int4(source, group_size, symmetric=symmetric)
    check_int8_block(source, (2, 128))
    check_int8_channel(source)


# ---------------------------------------------------------------------------------------------- dequantize


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_dequantize_every_code(scale: float) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(2, 128)
    check_dequantize_int8(codes, torch.tensor([[scale]]), (128, 128))
    check_dequantize_int8(codes, torch.tensor([[scale], [1e-3]]))
    every = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    packed = reference_integer.pack_int4(every)
    for dtype in (BF16, torch.float16, torch.float32):
        scales = torch.full((256, 1), scale).to(dtype)
        check_dequantize_int4(packed, scales, None)
        check_dequantize_int4(packed, scales, torch.arange(256, dtype=torch.uint8).view(256, 1))


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (129, 257), (576, 256), (7, 1025), (1, 18432)], ids=str)
def test_dequantize_int8_shapes(shape: tuple[int, int], block_size: tuple[int, int]) -> None:
    codes = random_bits(shape, 1, torch.int8)
    check_dequantize_int8(codes, random_scale(num_blocks(shape, block_size), 2), block_size)
    check_dequantize_int8(codes, random_scale((shape[0], 1), 3))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 9),
    group_size=st.sampled_from([8, 32, 48, 64, 128, 256, 512]),
    dtype=st.sampled_from([BF16, torch.float16, torch.float32]),
    zero=st.booleans(),
    wild=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dequantize_int4_property(
    *,
    rows: int,
    groups: int,
    group_size: int,
    dtype: torch.dtype,
    zero: bool,
    wild: bool,
    seed: int,
) -> None:
    packed = random_bits((rows, groups * group_size // 8), seed, INT32)
    make: Callable[..., Tensor] = random_bits if wild else random_weight
    zeros = random_bits((rows, groups), seed, torch.uint8) if zero else None
    check_dequantize_int4(packed, make((rows, groups), seed, dtype), zeros)


# -------------------------------------------------------------------------------------- items and arguments


def test_items_are_independent_and_empty_ones_allowed() -> None:
    sources = [make_source(shape, i, FP8) for i, shape in enumerate([(1, 128), (130, 512), (0, 128)])]
    packed = [torch.empty(s.weight.shape[0], s.weight.shape[1] // 8, dtype=INT32) for s in sources]
    scales = [torch.empty(s.weight.shape[0], s.weight.shape[1] // 32, dtype=BF16) for s in sources]
    weights, fp8_scales = (
        [s.weight for s in sources],
        [s.fp8_scale for s in sources if s.fp8_scale is not None],
    )
    counts = kernels.quantize_int4_group_into(weights, packed, scales, None, fp8_scales=fp8_scales)
    assert counts.tolist() == [num_nonfinite(s.values) for s in sources]
    for source, words, scale in zip(sources[:2], packed, scales, strict=False):
        expected = reference_integer.quantize_int4_group(source.values, group_size=32)
        assert_same(words, expected[0], "packed")
        assert_same(scale, expected[1], "scale")
    outs = [torch.empty(s.weight.shape, dtype=BF16) for s in sources]
    assert kernels.dequantize_int4_group_into(packed, scales, None, outs).tolist() == [0, 0, 0]
    assert_same(outs[1], reference_integer.dequantize_int4_group(packed[1], scales[1]), "weight")
    codes, rows = [torch.empty(0, 128, dtype=torch.int8)], [torch.empty(0, 1)]
    assert kernels.quantize_int8_channel_into([weights[2]], codes, rows, fp8_scales=[fp8_scales[2]])[0] == 0
    assert kernels.dequantize_int8_channel_into(codes, rows, [outs[2]]).tolist() == [0]


def test_threads_do_not_disturb_each_other() -> None:
    sources = [make_source((130, 1024), i, FP8, wild=i % 2 == 0) for i in range(8)]

    def convert(source: Source) -> None:
        check_int4(source, 64)
        check_int8_block(source)
        check_int8_channel(source)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(convert, sources)) == [None] * 8


def test_the_search_fits_into_the_lanes() -> None:
    assert len(reference_integer.SCALE_FACTORS) <= cpu_int4._LANES
    assert reference_integer.SCALE_FACTORS[0] == 1.0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 3, dtype=dtype)


INT8, U8 = torch.int8, torch.uint8
GOOD = {
    "quantize_int4_group_into": [
        *(empty(4, 64), empty(4, 8, dtype=INT32), empty(4, 2, dtype=BF16), empty(4, 2, dtype=U8)),
    ],
    "dequantize_int4_group_into": [
        *(empty(4, 8, dtype=INT32), empty(4, 2, dtype=BF16), empty(4, 2, dtype=U8), empty(4, 64)),
    ],
    "quantize_int8_block_into": [empty(130, 64), empty(130, 64, dtype=INT8), empty(2, 1)],
    "quantize_int8_channel_into": [empty(4, 64), empty(4, 64, dtype=INT8), empty(4, 1)],
    "dequantize_int8_block_into": [empty(130, 64, dtype=INT8), empty(2, 1), empty(130, 64)],
    "dequantize_int8_channel_into": [empty(4, 64, dtype=INT8), empty(4, 1), empty(4, 64)],
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: torch.cat([tensor] * 3).t()[:, : tensor.shape[0]],
    "one row less": lambda tensor: tensor[:-1].clone(),
    "one column more": lambda tensor: torch.cat([tensor, tensor[:, :1]], 1),
    "strided": lambda tensor: torch.stack([tensor, tensor], 2)[:, :, 0],
    "flat": lambda tensor: tensor.flatten(),
    "another dtype": lambda tensor: tensor.to(torch.float64),
    "integers": lambda tensor: tensor.to(torch.int64),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("name", GOOD)
def test_wrong_tensors_are_refused_before_any_is_written(
    name: str, wrong: Callable[[Tensor], Tensor]
) -> None:
    """The right item before the wrong one is not touched either; right ones alone are accepted."""
    function, good = getattr(kernels, name), GOOD[name]
    for i in range(len(good)):
        arguments = [[tensor.clone(), tensor.clone()] for tensor in good]
        arguments[i][1] = wrong(good[i])
        with pytest.raises(FormatError, match=f"{name}, item 1: "):
            function(*arguments)
        for pair, tensor in zip(arguments, good, strict=True):
            assert torch.equal(pair[0], tensor)
    function(*([tensor.clone(), tensor.clone()] for tensor in good))


def test_wrong_options_are_refused() -> None:
    weight, packed, scale, _ = GOOD["quantize_int4_group_into"]
    codes, fp8_scale = torch.zeros(4, 64).to(FP8), empty(1, 1)
    quantize = kernels.quantize_int4_group_into
    with pytest.raises(ValueError, match="search"):
        quantize([weight], [packed], [scale], None, search="best")
    with pytest.raises(FormatError, match="weights"):
        quantize([weight], [packed], [scale], None, fp8_scales=[fp8_scale])
    with pytest.raises(FormatError, match="weights"):
        quantize([codes], [packed], [scale], None)
    with pytest.raises(FormatError, match="fp8_scales"):
        quantize([codes], [packed], [scale], None, fp8_scales=[empty(1, 2)])
    with pytest.raises(FormatError, match="positive block sizes"):
        quantize([codes], [packed], [scale], None, fp8_scales=[fp8_scale], fp8_block_size=(0, 1))
    with pytest.raises(FormatError, match="multiple of 8"):
        quantize([weight], [packed], [empty(4, 16, dtype=BF16)], None)
    with pytest.raises(FormatError, match="multiple of 8"):
        quantize([weight], [packed], [empty(4, 0, dtype=BF16)], None)
    with pytest.raises(FormatError, match="at most 256"):
        quantize([empty(4, 512)], [empty(4, 64, dtype=INT32)], [empty(4, 1, dtype=BF16)], None)
    with pytest.raises(FormatError, match="positive block sizes"):
        kernels.quantize_int8_block_into(
            *([tensor] for tensor in GOOD["quantize_int8_block_into"]), block_size=(4, 0)
        )
    with pytest.raises(ValueError, match="zip"):
        quantize([weight, weight], [packed], [scale], None)
