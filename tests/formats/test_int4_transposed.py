"""GPTQ's and AWQ's layouts: bytes written by hand, their tools' own formulas, codes moved between layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import INT4, INT4AWQ, INT4GPTQ, INT4Packed, check_parts
from dsv3_tools.formats.recode import recode_into
from tests.formats.weights import (
    INT4_FORMATS,
    Grid,
    all_bits,
    bits,
    empty_parts,
    lay_out,
    make_grid,
    make_weight,
)


def moved(source: INT4, target: INT4, item: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parts that recoding writes."""
    shape = source.shape_of(tuple(item[source.weight_part].shape))
    out = empty_parts(target, shape)
    assert recode_into(source, target, [item], [out]).tolist() == [0]
    return {part: tensor for part, tensor in out.items() if part not in target.fixed(shape)}


def stored(fmt: INT4, grid: Grid) -> dict[str, bytes]:
    """Returns what `moved` should, by the layouts of the tests."""
    fixed = fmt.fixed(grid.codes.shape)
    return {part: bits(tensor) for part, tensor in lay_out(fmt, grid).items() if part not in fixed}


# Bytes.

CODES = ((np.arange(8)[:, None] + np.arange(32)[None, :]) % 16).astype(np.uint8)
"""Row n, column k: n + k, in four bits."""

SCALES = torch.tensor([[2.0**n, -(2.0**n)] for n in range(8)]).bfloat16()
"""Two groups of 16 columns; a negative scale is no scale, but shows where it lies."""

PACKED = {
    "weight_packed": torch.frombuffer(
        bytearray.fromhex(
            """
            10325476 98badcfe 10325476 98badcfe
            21436587 a9cbed0f 21436587 a9cbed0f
            32547698 badcfe10 32547698 badcfe10
            436587a9 cbed0f21 436587a9 cbed0f21
            547698ba dcfe1032 547698ba dcfe1032
            6587a9cb ed0f2143 6587a9cb ed0f2143
            7698badc fe103254 7698badc fe103254
            87a9cbed 0f214365 87a9cbed 0f214365
            """
        ),
        dtype=torch.int32,
    ).reshape(8, 4),
    "weight_scale": SCALES,
    "weight_shape": torch.tensor([8, 32]),
}

SCALES_TRANSPOSED = bytes.fromhex(
    "803f 0040 8040 0041 8041 0042 8042 0043" + "80bf 00c0 80c0 00c1 80c1 00c2 80c2 00c3"
)


def test_gptq_byte_by_byte() -> None:
    """Words hold eight columns of a row of the weight, the first lowest, and lie transposed."""
    parts = moved(INT4Packed(16), INT4GPTQ(16), PACKED)
    assert list(parts) == ["qweight", "scales"]
    assert bits(parts["qweight"]) == bytes.fromhex(
        """
        10325476 21436587 32547698 436587a9 547698ba 6587a9cb 7698badc 87a9cbed
        98badcfe a9cbed0f badcfe10 cbed0f21 dcfe1032 ed0f2143 fe103254 0f214365
        10325476 21436587 32547698 436587a9 547698ba 6587a9cb 7698badc 87a9cbed
        98badcfe a9cbed0f badcfe10 cbed0f21 dcfe1032 ed0f2143 fe103254 0f214365
        """
    )
    assert bits(parts["scales"]) == SCALES_TRANSPOSED


def test_awq_byte_by_byte() -> None:
    """Words hold eight rows of a column, in four-bit places: rows 0, 2, 4, 6, 1, 3, 5, 7."""
    parts = moved(INT4Packed(16), INT4AWQ(16), PACKED)
    assert list(parts) == ["qweight", "scales"]
    assert bits(parts["qweight"]) == 2 * bytes.fromhex(
        """
        20643175 31754286 42865397 539764a8 64a875b9 75b986ca 86ca97db 97dba8ec
        a8ecb9fd b9fdca0e ca0edb1f db1fec20 ec20fd31 fd310e42 0e421f53 1f532064
        """
    )
    assert bits(parts["scales"]) == SCALES_TRANSPOSED


def test_what_follows_from_the_shape_byte_by_byte() -> None:
    """Version 1 stores the zero point 8 as 7, version 2 and AWQ as 8; columns name their groups."""
    indices = "00000000" * 16 + "01000000" * 16
    for version, word in ((1, "77777777"), (2, "88888888")):
        assert INT4GPTQ(16, version=version).fixed((16, 32)) == {
            "qzeros": bytes.fromhex(word * 4),
            "g_idx": bytes.fromhex(indices),
        }
        assert INT4GPTQ(16, version=version, act_order=True).fixed((16, 32)) == {
            "qzeros": bytes.fromhex(word * 4)
        }
    assert INT4GPTQ(16, symmetric=False).fixed((16, 32)) == {"g_idx": bytes.fromhex(indices)}
    assert INT4GPTQ(-1).fixed((8, 32)) == {
        "qzeros": bytes.fromhex("77777777"),
        "g_idx": bytes(4 * 32),
    }
    assert INT4AWQ(16).fixed((16, 32)) == {"qzeros": bytes.fromhex("88888888" * 4)}
    assert INT4AWQ(16, symmetric=False).fixed((16, 32)) == {}


def test_a_weight_of_zeros_byte_by_byte() -> None:
    weight = torch.zeros((8, 32))
    gptq, awq = INT4GPTQ(32).encode(weight), INT4AWQ(32).encode(weight)
    assert all_bits(gptq) == {
        "qweight": bytes.fromhex("88888888" * 32),
        "qzeros": bytes.fromhex("77777777"),
        "scales": bytes.fromhex("803f" * 8),
        "g_idx": bytes(4 * 32),
    }
    assert all_bits(awq) == {
        "qweight": bytes.fromhex("88888888" * 32),
        "qzeros": bytes.fromhex("88888888"),
        "scales": bytes.fromhex("803f" * 8),
    }


@pytest.mark.parametrize(
    ("fmt", "word"),
    [
        (INT4GPTQ(16, symmetric=False, version=1), "0f214365"),  # 0 less one is 15
        (INT4GPTQ(16, symmetric=False, version=2), "10325476"),
        (INT4AWQ(16, symmetric=False), "20643175"),
    ],
    ids=str,
)
def test_zero_points_byte_by_byte(fmt: INT4, word: str) -> None:
    """Row n has zero point n, in both groups."""
    parts = lay_out(fmt, Grid(CODES, torch.ones((8, 2)).bfloat16(), CODES[:, :2]))
    parts["qzeros"] = torch.frombuffer(bytearray.fromhex(word * 2), dtype=torch.int32).reshape(2, 1)
    expected = CODES.astype(float) - np.arange(8)[:, None]
    assert fmt.decode(parts, dtype="F32").tolist() == expected.tolist()


# The formulas of the tools that the layouts come from, element by element.


def unsigned(tensor: Tensor) -> list[list[int]]:
    rows: list[list[int]] = tensor.numpy().view(np.uint32).tolist()
    return rows


def gptq_formula(parts: Mapping[str, Tensor], version: int) -> Tensor:
    """AutoGPTQ's `qlinear`: scales[g_idx[k]] x (weight - zeros[g_idx[k]]).

    In version 1 the zero points are those stored + 1, in four bits. Returns `[outputs, inputs]`.
    """
    words, zeros = unsigned(parts["qweight"]), unsigned(parts["qzeros"])
    scales, groups = parts["scales"].float().numpy(), parts["g_idx"].tolist()
    outputs, inputs = len(words[0]), 8 * len(words)
    weight = np.empty((outputs, inputs), np.float32)
    for n, k in product(range(outputs), range(inputs)):
        code = words[k // 8][n] >> 4 * (k % 8) & 15
        zero = zeros[groups[k]][n // 8] >> 4 * (n % 8) & 15
        if version == 1:
            zero = zero + 1 & 15
        weight[n, k] = np.float32(code - zero) * scales[groups[k], n]
    return torch.from_numpy(weight)


AWQ_REVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""AutoAWQ: where in a word each of eight neighbours is."""


def awq_formula(parts: Mapping[str, Tensor], group_size: int) -> Tensor:
    """AutoAWQ's `dequantize_gemm`: (weight - zeros) x scales, both unpacked and put back in order."""
    words, zeros = unsigned(parts["qweight"]), unsigned(parts["qzeros"])
    scales = parts["scales"].float().numpy()
    inputs, outputs = len(words), 8 * len(words[0])
    weight = np.empty((outputs, inputs), np.float32)
    for n, k in product(range(outputs), range(inputs)):
        shift = 4 * AWQ_REVERSE_ORDER[n % 8]
        code, zero = words[k][n // 8] >> shift & 15, zeros[k // group_size][n // 8] >> shift & 15
        weight[n, k] = np.float32(code - zero) * scales[k // group_size, n]
    return torch.from_numpy(weight)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_gptq_by_its_formula(group_size: int, version: int, symmetric: bool, dtype: str) -> None:
    fmt = INT4GPTQ(group_size, symmetric, dtype, version=version)
    parts = lay_out(fmt, make_grid(fmt, (16, 256), seed=version))
    weight = gptq_formula(parts, version)
    assert bits(fmt.decode(parts, dtype="F32")) == bits(weight)
    assert bits(fmt.decode(parts)) == bits(weight.bfloat16())
    other = replace(fmt, version=3 - version)
    assert symmetric or bits(other.decode(parts, dtype="F32")) != bits(weight)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_awq_by_its_formula(group_size: int, symmetric: bool, dtype: str) -> None:
    fmt = INT4AWQ(group_size, symmetric, dtype)
    parts = lay_out(fmt, make_grid(fmt, (16, 256)))
    weight = awq_formula(parts, 256 if group_size == -1 else group_size)
    assert bits(fmt.decode(parts, dtype="F32")) == bits(weight)
    assert bits(fmt.decode(parts)) == bits(weight.bfloat16())


@pytest.mark.parametrize("size", [32, 64, 128])
def test_what_we_write_by_the_formulas(size: int) -> None:
    weight = make_weight((16, 256))
    for version in (1, 2):
        gptq = INT4GPTQ(size, version=version)
        parts = gptq.encode(weight)
        assert bits(gptq_formula(parts, version)) == bits(gptq.decode(parts, dtype="F32"))
    for symmetric in (True, False):
        awq = INT4AWQ(size, symmetric)
        parts = awq.encode(weight)
        assert bits(awq_formula(parts, size)) == bits(awq.decode(parts, dtype="F32"))


# GPTQ's columns in another order (`desc_act`).


def shuffled(fmt: INT4GPTQ, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Returns parts whose columns belong to groups at random, as many to each."""
    parts = lay_out(fmt, make_grid(fmt, shape, seed))
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    return parts | {"g_idx": parts["g_idx"][order].contiguous()}


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_act_order_by_the_formula(group_size: int, version: int, symmetric: bool, dtype: str) -> None:
    fmt = INT4GPTQ(group_size, symmetric, dtype, version=version, act_order=True)
    parts = shuffled(fmt, (16, 256), seed=version)
    weight = gptq_formula(parts, version)
    assert bits(fmt.decode(parts, dtype="F32")) == bits(weight)
    assert bits(fmt.decode(parts)) == bits(weight.bfloat16())
    in_order = replace(fmt, act_order=False)
    assert group_size == -1 or bits(in_order.decode(parts, dtype="F32")) != bits(weight)


def test_act_order_of_columns_in_order_is_no_other_weight() -> None:
    fmt = INT4GPTQ(32, symmetric=False, scale_dtype="F16")
    parts = lay_out(fmt, make_grid(fmt, (16, 256)))
    assert bits(replace(fmt, act_order=True).decode(parts)) == bits(fmt.decode(parts))


def test_act_order_of_more_rows_than_are_decoded_at_once() -> None:
    fmt = INT4GPTQ(8, symmetric=False, act_order=True)
    grid = make_grid(fmt, (2056, 32))
    parts = lay_out(fmt, grid)
    parts["g_idx"] = parts["g_idx"].flip(0).contiguous()
    columns = parts["g_idx"].long()
    zeros = torch.from_numpy(grid.zeros.astype(np.float32))
    weight = (torch.from_numpy(grid.codes.astype(np.float32)) - zeros[:, columns]) * grid.scales[:, columns]
    assert bits(fmt.decode(parts, dtype="F32")) == bits(weight)


def test_act_order_spells_and_counts_what_is_not_finite() -> None:
    fmt = INT4GPTQ(32, symmetric=False, act_order=True)
    items = [shuffled(fmt, (16, 256), seed) for seed in range(3)]
    items[1]["scales"][3, 5] = torch.nan
    items[2]["scales"][3, 5] = torch.inf
    for dtype, integer, nan in (
        (torch.bfloat16, torch.int16, 0x7FC0),
        (torch.float32, torch.int32, 0x7FC0_0000),
    ):
        outs = [torch.empty((16, 256), dtype=dtype) for _ in items]
        assert fmt.decode_into(items, outs).tolist() == [0, 32, 32]
        for item, out in zip(items[1:], outs[1:], strict=True):
            where = torch.zeros((16, 256), dtype=torch.bool)
            where[5] = item["g_idx"] == 3
            assert torch.equal(~torch.isfinite(out), where)
            assert (out.view(integer)[torch.isnan(out)] == nan).all()


@pytest.mark.parametrize(("index", "found"), [(-1, "-1 to 7"), (8, "0 to 8"), (2**31 - 1, "0 to 2147483647")])
def test_columns_of_groups_that_do_not_exist(index: int, found: str) -> None:
    """-1 would be taken for the last group."""
    fmt = INT4GPTQ(32, act_order=True)
    parts = shuffled(fmt, (16, 256))
    parts["g_idx"][200] = index
    with pytest.raises(FormatError, match=f"^int4_gptq: g_idx names the groups {found}, expected 0 to 7$"):
        fmt.decode(parts)


# Codes that move.

PAIRS = [
    (a, b)
    for a, b in product(INT4_FORMATS, repeat=2)
    if (INT4_FORMATS[a].group_size, INT4_FORMATS[a].symmetric, INT4_FORMATS[a].scale_dtype)
    == (INT4_FORMATS[b].group_size, INT4_FORMATS[b].symmetric, INT4_FORMATS[b].scale_dtype)
    and (INT4_FORMATS[b].symmetric or not isinstance(INT4_FORMATS[b], INT4GPTQ))
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_codes_move_exactly_there_and_back(a: str, b: str) -> None:
    source, target = INT4_FORMATS[a], INT4_FORMATS[b]
    for seed, shape in enumerate([(8, 128), (136, 384), (24, 1152)]):
        grid = make_grid(source, shape, seed)
        item = lay_out(source, grid)
        there = moved(source, target, item)
        assert {part: bits(tensor) for part, tensor in there.items()} == stored(target, grid)
        if (b, a) in PAIRS:
            whole = {**lay_out(target, grid), **there}
            back = moved(target, source, whole)
            assert {part: bits(tensor) for part, tensor in back.items()} == stored(source, grid)


ASYMMETRIC = [name for name, fmt in INT4_FORMATS.items() if not fmt.symmetric]


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_asymmetric_codes_move_between_all_that_can_store_them(name: str) -> None:
    """GPTQ's as well, from where they only leave, each zero point from 0 to 15 included."""
    source = INT4_FORMATS[name]
    grid = make_grid(source, (136, 384))
    assert len(np.unique(grid.zeros)) == 16
    targets: list[INT4] = [
        INT4Packed(source.group_size, symmetric=False, scale_dtype=source.scale_dtype),
        INT4AWQ(source.group_size, symmetric=False, scale_dtype=source.scale_dtype),
    ]
    for target in targets:
        there = moved(source, target, lay_out(source, grid))
        assert {part: bits(tensor) for part, tensor in there.items()} == stored(target, grid)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_three_layouts_of_the_same_codes_are_the_same_weight(group_size: int) -> None:
    weight = make_weight((24, 384))
    formats: list[INT4] = [
        INT4Packed(group_size),
        INT4GPTQ(group_size),
        INT4GPTQ(group_size, version=2),
        INT4AWQ(group_size),
    ]
    decoded = {bits(fmt.decode(fmt.encode(weight), dtype="F32")) for fmt in formats}
    assert len(decoded) == 1
    asymmetric: list[INT4] = [INT4Packed(group_size, symmetric=False), INT4AWQ(group_size, symmetric=False)]
    others = {bits(fmt.decode(fmt.encode(weight), dtype="F32")) for fmt in asymmetric}
    assert len(others) == 1
    assert others != decoded


def test_a_group_of_several_shapes_moves_as_each_alone() -> None:
    source, target = INT4Packed(32), INT4AWQ(32)
    grids = [make_grid(source, shape) for shape in [(8, 32), (16, 256), (136, 64)]]
    outs = [empty_parts(target, grid.codes.shape) for grid in grids]
    assert recode_into(source, target, [lay_out(source, grid) for grid in grids], outs).tolist() == [0] * 3
    for grid, out in zip(grids, outs, strict=True):
        expected = stored(target, grid)
        assert {part: bits(out[part]) for part in expected} == expected
        assert bits(out["qzeros"]) == b"\xa5" * out["qzeros"].nbytes, "somebody else's to write"


@pytest.mark.parametrize(
    "source",
    [INT4GPTQ(32, act_order=True), INT4GPTQ(32, symmetric=False, act_order=True)],
    ids=["symmetric", "asymmetric"],
)
def test_codes_of_another_column_order_are_never_moved(source: INT4GPTQ) -> None:
    """Their groups are no neighbours: they are decoded, and quantized again."""
    item = shuffled(source, (16, 256))
    for target in (INT4Packed(32, source.symmetric), INT4AWQ(32, source.symmetric)):
        assert not source.same_grid(target)
        out = empty_parts(target, (16, 256))
        recode_into(source, target, [item], [out])
        encoded = target.encode(source.decode(item, dtype="F32"))
        for part in ("weight_packed", "weight_scale", "qweight", "scales"):
            assert part not in out or bits(out[part]) == bits(encoded[part])


# compressed-tensors has a converter of its own.


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_awq_becomes_what_compressed_tensors_makes_of_it(group_size: int, dtype: str) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    source = INT4AWQ(group_size, symmetric=False, scale_dtype=dtype)
    item = lay_out(source, make_grid(source, (24, 256)))
    converter = converters.AutoAWQConverter(group_size=group_size, zero_point=True)
    made = converter.process({f"x.{part}": tensor for part, tensor in item.items()})
    target = INT4Packed(group_size, symmetric=False, scale_dtype=dtype)
    own = moved(source, target, item)
    own["weight_shape"] = torch.frombuffer(
        bytearray(target.fixed((24, 256))["weight_shape"]), dtype=torch.int64
    )
    assert {f"x.{part}": bits(tensor) for part, tensor in own.items()} == all_bits(made)


# Parts and refusals.


def test_parts_of_an_expert() -> None:
    """2,048 outputs, 7,168 inputs."""
    assert INT4GPTQ().parts((2048, 7168)) == {
        "qweight": TensorSpec("I32", (896, 2048)),
        "qzeros": TensorSpec("I32", (56, 256)),
        "scales": TensorSpec("BF16", (56, 2048)),
        "g_idx": TensorSpec("I32", (7168,)),
    }
    assert INT4AWQ(64, symmetric=False, scale_dtype="F16").parts((2048, 7168)) == {
        "qweight": TensorSpec("I32", (7168, 256)),
        "qzeros": TensorSpec("I32", (112, 256)),
        "scales": TensorSpec("F16", (112, 2048)),
    }
    assert INT4GPTQ().row_alignment is None
    assert INT4AWQ().row_alignment is None


GPTQ_PARTS = lay_out(INT4GPTQ(64), make_grid(INT4GPTQ(64), (16, 256)))
AWQ_PARTS = lay_out(INT4AWQ(64), make_grid(INT4AWQ(64), (16, 256)))

WRONG_PARTS: dict[str, tuple[INT4, dict[str, Tensor], str]] = {
    "nothing": (INT4GPTQ(64), {}, "no part 'qweight'"),
    "packed": (INT4GPTQ(64), PACKED, "no part 'qweight'"),
    "AWQ as GPTQ": (INT4GPTQ(64), AWQ_PARTS, "got a weight of shape|got the parts"),
    "GPTQ as AWQ": (INT4AWQ(64), GPTQ_PARTS, "got a weight of shape|got the parts"),
    "no g_idx": (INT4GPTQ(64), {k: v for k, v in GPTQ_PARTS.items() if k != "g_idx"}, "got the parts"),
    "a g_idx": (INT4AWQ(64), {**AWQ_PARTS, "g_idx": GPTQ_PARTS["g_idx"]}, "got the parts"),
    "no zero points": (INT4AWQ(64), {k: v for k, v in AWQ_PARTS.items() if k != "qzeros"}, "got the parts"),
    "I64 g_idx": (INT4GPTQ(64), {**GPTQ_PARTS, "g_idx": GPTQ_PARTS["g_idx"].long()}, "int64 .*expected I32"),
    "scales by rows": (
        INT4GPTQ(64),
        {**GPTQ_PARTS, "scales": GPTQ_PARTS["scales"].t()},
        r"scales is torch.bfloat16 \[16, 4\], expected BF16 \[4, 16\]",
    ),
    "half scales": (
        INT4AWQ(64),
        {**AWQ_PARTS, "scales": AWQ_PARTS["scales"].half()},
        "float16 .*expected BF16",
    ),
    "other groups": (INT4AWQ(32), AWQ_PARTS, r"\[4, 2\], expected I32 \[8, 2\]"),
    "one dimension": (INT4AWQ(64), {**AWQ_PARTS, "qweight": AWQ_PARTS["qweight"][0]}, "two dimensions"),
    "words of 64": (INT4GPTQ(64), {**GPTQ_PARTS, "qweight": GPTQ_PARTS["qweight"].long()}, "torch.int64"),
    "a group and a half": (
        INT4GPTQ(64),
        {**GPTQ_PARTS, "qweight": GPTQ_PARTS["qweight"][:12]},
        r"shape \[16, 96\], expected columns in multiples of 64, rows in multiples of 8",
    ),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_wrong_parts(case: str) -> None:
    fmt, parts, expected = WRONG_PARTS[case]
    for refuse in (lambda: check_parts(fmt, parts), lambda: fmt.decode(parts)):
        with pytest.raises(FormatError, match=expected) as caught:
            refuse()
        assert str(caught.value).startswith(f"{fmt.name}: ")
        assert str(caught.value).isprintable()


def test_control_the_right_parts() -> None:
    assert check_parts(INT4GPTQ(64), GPTQ_PARTS) == (16, 256)
    assert check_parts(INT4AWQ(64), AWQ_PARTS) == (16, 256)


NEVER_STORED = [
    INT4GPTQ(symmetric=False),
    INT4GPTQ(symmetric=False, version=2),
    INT4GPTQ(act_order=True),
    INT4GPTQ(symmetric=False, act_order=True),
]


@pytest.mark.parametrize("target", NEVER_STORED, ids=str)
def test_gptq_is_written_symmetric_and_in_order_only(target: INT4GPTQ) -> None:
    """Neither from a weight nor by moving: no part would hold the zero points, or the order."""
    source = INT4Packed(symmetric=target.symmetric)
    item = lay_out(source, make_grid(source, (16, 256)))
    refusals: list[Callable[[], Any]] = [
        lambda: target.encode(make_weight((16, 256))),
        lambda: recode_into(source, target, [item], [empty_parts(target, (16, 256))]),
    ]
    for refuse in refusals:
        with pytest.raises(FormatError, match=r"^int4_gptq: only symmetric codes in the columns' own order"):
            refuse()
