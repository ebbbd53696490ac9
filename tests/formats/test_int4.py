"""INT4 groups in compressed-tensors' layout: bytes by hand, bounds, refusals, compressed-tensors' opinion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import INT4, INT4AWQ, INT4GPTQ, INT4Packed, check_parts
from dsv3_tools.kernels.reference_integer import SCALE_FACTORS
from tests.formats.weights import (
    INT4_FORMATS,
    all_bits,
    bits,
    from_words,
    lay_out,
    make_grid,
    make_weight,
    read_out,
    spread_scale,
)


def matrix(text: str, dtype: torch.dtype, rows: int = 1) -> Tensor:
    """Returns the tensor with these bytes in hexadecimal."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).reshape(rows, -1)


# Bytes.

SYMMETRIC_ROW = [
    *(-7.5, 7.5, 0.0, 1.0, -1.0, 0.5, 1.5, 2.5),  # codes 0 f 8 9  7 8 a a: ties go to even codes
    *(-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.5, -0.5),  # 1 2 3 4  5 6 6 8
    *(7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0),  # f e d c  b a 9 8
    *(0.0,) * 8,
]
SYMMETRIC_BACK = [
    *(-8.0, 7.0, 0.0, 1.0, -1.0, 0.0, 2.0, 2.0),
    *(-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -2.0, 0.0),
    *(7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0),
    *(0.0,) * 8,
]
"""With a scale of 1: the group's largest magnitude is 7.5."""


def test_symmetric_codes_byte_by_byte() -> None:
    """Eight neighbours to a word, the first lowest, each code + 8; scales in BF16; the shape in I64."""
    weight = torch.tensor([SYMMETRIC_ROW, [2 * x for x in SYMMETRIC_ROW], [-x / 4 for x in SYMMETRIC_ROW]])
    fmt = INT4Packed(group_size=32, search="absmax")
    parts = fmt.encode(weight)
    assert tuple(parts) == ("weight_packed", "weight_scale", "weight_shape")
    assert bits(parts["weight_packed"]) == bytes.fromhex(
        """
        f0 98 87 aa  21 43 65 86  ef cd ab 89  88 88 88 88
        f0 98 87 aa  21 43 65 86  ef cd ab 89  88 88 88 88
        0f 78 89 66  ef cd ab 8a  21 43 65 87  88 88 88 88
        """
    )
    assert bits(parts["weight_scale"]) == bytes.fromhex("803f 0040 803e")
    assert bits(parts["weight_shape"]) == bytes.fromhex("0300000000000000 2000000000000000")
    decoded = fmt.decode(parts, dtype="F32")
    assert decoded[:2].tolist() == [SYMMETRIC_BACK, [2 * x for x in SYMMETRIC_BACK]]
    assert decoded[2, :9].tolist() == [1.75, -2.0, 0.0, -0.25, 0.25, 0.0, -0.5, -0.5, 1.75]


def test_asymmetric_codes_byte_by_byte() -> None:
    """Row r holds -r ... 15 - r: the scale is 1, the zero point r, and the codes count from 0 to 15, twice.

    Eight rows' zero points are a word, the first row's lowest.
    """
    rows = torch.arange(16)[:, None]
    weight = (torch.arange(32)[None, :] % 16 - rows).float()
    fmt = INT4Packed(group_size=32, symmetric=False, search="absmax")
    parts = fmt.encode(weight)
    assert tuple(parts) == ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    assert bits(parts["weight_packed"]) == bytes.fromhex("10325476 98badcfe 10325476 98badcfe") * 16
    assert bits(parts["weight_scale"]) == bytes.fromhex("803f") * 16
    assert bits(parts["weight_shape"]) == bytes.fromhex("1000000000000000 2000000000000000")
    assert bits(parts["weight_zero_point"]) == bytes.fromhex("10325476 98badcfe")
    assert parts["weight_zero_point"].shape == (2, 1)
    assert torch.equal(fmt.decode(parts, dtype="F32"), weight)


def test_zero_points_lie_by_groups_then_rows() -> None:
    """The zero point of row r in group g is the r-th four bits of word g."""
    fmt = INT4Packed(group_size=8, symmetric=False, scale_dtype="F32", shape_dtype="I32")
    parts = {
        "weight_packed": torch.zeros((8, 2), dtype=torch.int32),
        "weight_scale": torch.ones((8, 2)),
        "weight_shape": matrix("08000000 10000000", torch.int32)[0],
        "weight_zero_point": matrix("10325476 98badcfe", torch.int32),
    }
    first, second = torch.arange(8)[:, None].expand(8, 8), 8 + torch.arange(8)[:, None].expand(8, 8)
    assert torch.equal(fmt.decode(parts, dtype="F32"), -torch.cat([first, second], 1).float())


def test_the_shape_is_written_as_it_is_declared() -> None:
    assert INT4Packed().fixed((7168, 2048)) == {
        "weight_shape": bytes.fromhex("001c000000000000 0008000000000000")
    }
    assert INT4Packed(shape_dtype="I32").fixed((7168, 2048)) == {
        "weight_shape": bytes.fromhex("001c0000 00080000")
    }


# Parts.


def test_parts_of_an_expert() -> None:
    assert INT4Packed().parts((2048, 7168)) == {
        "weight_packed": TensorSpec("I32", (2048, 896)),
        "weight_scale": TensorSpec("BF16", (2048, 56)),
        "weight_shape": TensorSpec("I64", (2,)),
    }
    assert INT4Packed(32, symmetric=False).parts((2048, 7168)) == {
        "weight_packed": TensorSpec("I32", (2048, 896)),
        "weight_scale": TensorSpec("BF16", (2048, 224)),
        "weight_shape": TensorSpec("I64", (2,)),
        "weight_zero_point": TensorSpec("I32", (256, 224)),
    }
    assert INT4Packed(-1).parts((2048, 7168))["weight_scale"] == TensorSpec("BF16", (2048, 1))
    assert (INT4Packed().row_alignment, INT4Packed(symmetric=False).row_alignment) == (1, 8)


@pytest.mark.parametrize("name", INT4_FORMATS)
def test_what_a_format_says_of_itself(name: str) -> None:
    fmt = INT4_FORMATS[name]
    parts = lay_out(fmt, make_grid(fmt, (16, 384)))
    assert check_parts(fmt, parts) == (16, 384)
    assert fmt.part_names == tuple(fmt.parts((16, 384)))
    assert set(fmt.part_names) == set(parts)
    assert {part: bits(parts[part]) for part in fmt.fixed((16, 384))} == fmt.fixed((16, 384))
    base = type(fmt)(fmt.group_size, fmt.symmetric)
    specs = fmt.parts((16, 384))
    fitted = base.fitted(specs)
    assert (fitted.scale_dtype, fitted.parts((16, 384))[fmt.weight_part]) == (
        fmt.scale_dtype,
        specs[fmt.weight_part],
    )
    if not isinstance(fmt, INT4GPTQ):
        assert fitted == fmt
    assert base.fitted({}) == base


@pytest.mark.parametrize("name", INT4_FORMATS)
def test_every_layout_is_decoded_to_what_it_stores(name: str) -> None:
    """All codes, all zero points, scales in BF16, F16 and F32."""
    fmt = INT4_FORMATS[name]
    for seed, shape in enumerate([(8, 128), (136, 384), (24, 1152)]):
        grid = make_grid(fmt, shape, seed)
        parts = lay_out(fmt, grid)
        assert bits(fmt.decode(parts, dtype="F32")) == bits(grid.weight())
        assert bits(fmt.decode(parts)) == bits(grid.weight().bfloat16())
        assert all_bits(parts) == all_bits(lay_out(fmt, grid)), "decoding changes nothing"


@pytest.mark.parametrize("name", INT4_FORMATS)
def test_control_one_flipped_bit_is_one_other_weight(name: str) -> None:
    fmt = INT4_FORMATS[name]
    parts = lay_out(fmt, make_grid(fmt, (16, 384)))
    before = fmt.decode(parts, dtype="F32")
    for word, place in ((0, 0), (5, 17), (-1, 30)):
        parts[fmt.weight_part].view(-1)[word] ^= 1 << place
        changed = fmt.decode(parts, dtype="F32") != before
        assert changed.sum() == 1
        parts[fmt.weight_part].view(-1)[word] ^= 1 << place


def test_row_groups_and_named_groups_are_the_same_codes() -> None:
    """Group size -1 is a row of its own length."""
    for kind in (INT4Packed, INT4GPTQ, INT4AWQ):
        named: INT4 = kind(group_size=384, symmetric=kind is INT4GPTQ)
        rows: INT4 = kind(group_size=-1, symmetric=kind is INT4GPTQ)
        parts = lay_out(named, make_grid(named, (16, 384)))
        assert rows.parts((16, 384)) == named.parts((16, 384))
        assert rows.fixed((16, 384)) == named.fixed((16, 384))
        assert bits(rows.decode(parts)) == bits(named.decode(parts))


# How far a weight may be from its codes: see `error_bound` in `test_formats.py` for one step.

OUTSIDE = {
    # Scale: largest / 7.5, rounded to BF16 (2**-8 of it), and so quotients up to 7.5 (1 + 2**-8 + 2**-16).
    ("absmax", True): 7.5 * (1 + 2.0**-8 + 2.0**-15) - 7,
    # high - low is 15 (1 + 2**-8 + ...) steps, and zero within half a step of -low / scale.
    ("absmax", False): 15 * (2.0**-8 + 2.0**-15) + 0.5,
    # The search may take 0.64 of the plain scale.
    ("mse", True): 7.5 / 0.64 * (1 + 2.0**-8 + 2.0**-15) - 7,
    ("mse", False): 15 / 0.64 * (1 + 2.0**-8 + 2.0**-15) - 15 + 0.5,
}
"""By search and symmetry: steps that a quotient may be outside of the codes. Half a step inside is less."""


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_clamping_moves_a_weight_by_so_many_steps(group_size: int, search: str, symmetric: bool) -> None:
    weight = make_weight((64, 1024), torch.float32)
    weight[8:16] = weight[8:16].abs()  # groups on one side of zero
    weight[16:24] = -weight[16:24].abs()
    fmt = INT4Packed(group_size, symmetric, search=search)
    parts = fmt.encode(weight)
    error = (fmt.decode(parts, dtype="F32").double() - weight.double()).abs() / spread_scale(fmt, parts)
    assert error.max() <= max(0.5, OUTSIDE[search, symmetric]) + 2.0**-18
    assert error.max() > 0.45


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_scale_is_the_plain_one_times_a_factor_and_loses_no_more(group_size: int, symmetric: bool) -> None:
    weight = make_weight((64, 1024), torch.float32)
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    plain = groups.abs().amax(2) / 7.5 if symmetric else high / 15 - low / 15
    factors = torch.tensor(SCALE_FACTORS)
    candidates = (plain[:, :, None] * factors).bfloat16()
    found: dict[str, Tensor] = {}
    for search in ("absmax", "mse"):
        fmt = INT4Packed(group_size, symmetric, search=search)
        parts = fmt.encode(weight)
        allowed = candidates if search == "mse" else candidates[:, :, :1]
        assert (parts["weight_scale"][:, :, None] == allowed).any(2).all()
        error = (fmt.decode(parts, dtype="F32").double() - weight.double()).square()
        found[search] = error.unflatten(1, (-1, group_size)).sum(2)
    # Squared errors are compared with 16 fractional bits and quotients with two roundings.
    assert (found["mse"] <= found["absmax"] * (1 + 2.0**-10) + 1e-12).all()
    assert found["mse"].sum() < 0.95 * found["absmax"].sum()


# Refusals.


@pytest.mark.parametrize("size", [0, -2, -8, 1, 4, 7, 12, 100, True, 128.0, "128", None], ids=repr)
@pytest.mark.parametrize("kind", [INT4Packed, INT4GPTQ, INT4AWQ])
def test_impossible_group_sizes(kind: type[INT4], size: Any) -> None:
    with pytest.raises(FormatError, match=r"got group_size .*, expected a multiple of 8 or -1") as caught:
        kind(size)
    assert str(caught.value).startswith(f"{kind.name}: ")


@pytest.mark.parametrize(
    ("fmt", "shape", "expected"),
    [
        (INT4Packed(), (8, 64), "columns in multiples of 128$"),
        (INT4Packed(), (8, 192), "columns in multiples of 128$"),
        (INT4Packed(-1), (8, 12), "columns in multiples of 8$"),
        (INT4GPTQ(-1), (8, 12), "columns in multiples of 8, rows in multiples of 8$"),
        (INT4GPTQ(-1), (12, 8), "columns in multiples of 8, rows in multiples of 8$"),
        (INT4Packed(32, symmetric=False), (12, 32), "multiples of 32, rows in multiples of 8$"),
        (INT4AWQ(64), (8, 32), "multiples of 64, rows in multiples of 8$"),
    ],
)
def test_what_a_refusal_expects(fmt: INT4, shape: tuple[int, int], expected: str) -> None:
    with pytest.raises(FormatError, match=expected):
        fmt.parts(shape)


def wrong_parts() -> dict[str, tuple[dict[str, Tensor], str]]:
    fmt = INT4Packed(64)
    right = lay_out(fmt, make_grid(fmt, (16, 256)))
    packed, scale, shape = right["weight_packed"], right["weight_scale"], right["weight_shape"]
    return {
        "nothing": ({}, "no part 'weight_packed'"),
        "a weight": ({"weight": packed}, r"no part 'weight_packed' among \['weight'\]"),
        "missing scale": ({"weight_packed": packed, "weight_shape": shape}, "got the parts"),
        "missing shape": ({"weight_packed": packed, "weight_scale": scale}, "got the parts"),
        "zero points": ({**right, "weight_zero_point": packed}, "got the parts"),
        "order of columns": ({**right, "weight_g_idx": packed[0]}, "got the parts"),
        "other groups": ({**right, "weight_scale": scale[:, :2]}, r"\[16, 2\], expected BF16 \[16, 4\]"),
        "one scale a row": ({**right, "weight_scale": scale[:, :1]}, r"\[16, 1\], expected BF16 \[16, 4\]"),
        "flat scales": ({**right, "weight_scale": scale[0]}, r"\[4\], expected BF16 \[16, 4\]"),
        "scales transposed": ({**right, "weight_scale": scale.t()}, r"\[4, 16\], expected BF16 \[16, 4\]"),
        "scales of float32": ({**right, "weight_scale": scale.float()}, "float32 .*, expected BF16"),
        "scales of float64": ({**right, "weight_scale": scale.double()}, "float64 .*, expected BF16"),
        "bytes": ({**right, "weight_packed": packed.view(torch.uint8)}, "weight_packed is torch.uint8"),
        "I64 words": ({**right, "weight_packed": packed.long()}, "weight_packed is torch.int64"),
        "unsigned": ({**right, "weight_packed": packed.view(torch.uint32)}, "weight_packed is torch.uint32"),
        "one dimension": ({**right, "weight_packed": packed.reshape(-1)}, "expected two dimensions"),
        "a stack": ({**right, "weight_packed": packed[None]}, "expected two dimensions"),
        "half a group": ({**right, "weight_packed": packed[:, :28]}, "columns in multiples of 64"),
        "I32 shape": ({**right, "weight_shape": shape.int()}, "int32 .*, expected I64"),
        "three lengths": ({**right, "weight_shape": torch.cat([shape, shape[:1]])}, r"\[3\], expected I64"),
    }


WRONG_PARTS = wrong_parts()


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_wrong_parts(case: str) -> None:
    parts, expected = WRONG_PARTS[case]
    for refuse in (lambda: check_parts(INT4Packed(64), parts), lambda: INT4Packed(64).decode(parts)):
        with pytest.raises(FormatError, match=expected) as caught:
            refuse()
        assert str(caught.value).startswith("int4_packed: ")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "fmt",
    [
        INT4Packed(16),
        INT4Packed(256),
        INT4Packed(-1),
        INT4Packed(scale_dtype="F16"),
        INT4Packed(scale_dtype="F32"),
        INT4AWQ(-1),
        INT4GPTQ(scale_dtype="F16"),
    ],
    ids=str,
)
def test_what_is_only_read_is_never_written(fmt: INT4) -> None:
    with pytest.raises(FormatError, match="are only read; written are groups of 32, 64, 128 with BF16"):
        fmt.encode(make_weight((16, 256)))


@pytest.mark.parametrize("dtype", ["F64", "I32", "F8_E4M3"])
def test_scales_and_shapes_that_are_none_do_not_fit(dtype: str) -> None:
    specs = {"weight_scale": TensorSpec(dtype, (16, 4)), "weight_shape": TensorSpec("F32", (2,))}
    assert INT4Packed(64).fitted(specs) == INT4Packed(64)


def test_equal_parameters_equal_format() -> None:
    assert INT4Packed() == INT4Packed(128, symmetric=True, scale_dtype="BF16")
    assert INT4Packed(search="absmax") == INT4Packed(search="mse"), "how scales were chosen is not stored"
    assert INT4Packed(search="absmax").same_bytes(INT4Packed())
    different: set[Any] = {
        INT4Packed(),
        INT4Packed(64),
        INT4Packed(symmetric=False),
        INT4Packed(scale_dtype="F16"),
        INT4Packed(shape_dtype="I32"),
        INT4GPTQ(),
        INT4GPTQ(version=2),
        INT4GPTQ(act_order=True),
        INT4AWQ(),
    }
    assert len(different) == 9
    assert not any(a.same_bytes(b) for a in different for b in different if a is not b)


# compressed-tensors: the library whose layout it is.


def scheme(fmt: INT4Packed) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    rows = fmt.group_size == -1
    arguments = quantization.QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=fmt.symmetric,
        strategy="channel" if rows else "group",
        group_size=None if rows else fmt.group_size,
    )
    return quantization.QuantizationScheme(targets=["Linear"], weights=arguments)


def compressor() -> Any:
    return pytest.importorskip("compressed_tensors.compressors.pack_quantized").PackedQuantizationCompressor


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_compressed_tensors_decodes_alike(group_size: int, symmetric: bool, dtype: str) -> None:
    """It multiplies in the dtype of the scales, where ours rounds the float32 product: the same number."""
    fmt = INT4Packed(group_size, symmetric, dtype)
    parts = lay_out(fmt, make_grid(fmt, (24, 256)))
    decoded = compressor().decompress(parts, scheme(fmt))["weight"]
    assert decoded.dtype == torch_dtype(dtype)
    assert bits(fmt.decode(parts, dtype="F32").to(decoded.dtype)) == bits(decoded)
    if dtype == "BF16":
        assert bits(fmt.decode(parts)) == bits(decoded)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_compressed_tensors_reads_what_we_write(group_size: int, symmetric: bool) -> None:
    for search in ("absmax", "mse"):
        fmt = INT4Packed(group_size, symmetric, search=search)
        parts = fmt.encode(make_weight((24, 256)))
        assert set(parts) == set(compressor().compression_param_names(scheme(fmt)))
        assert bits(compressor().decompress(parts, scheme(fmt))["weight"]) == bits(fmt.decode(parts))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_compressed_tensors_quantizes_alike_in_float32(group_size: int) -> None:
    """Largest / 7.5 as a scale, rounded to BF16, and the same codes, shape and packing."""
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    fmt = INT4Packed(group_size, search="absmax")
    for dtype in (torch.float32, torch.bfloat16):
        weight = make_weight((24, 256), dtype)
        parts = fmt.encode(weight)
        least, most = weight.unflatten(1, (-1, group_size)).aminmax(dim=2)
        scale, _ = helpers.calculate_qparams(least, most, scheme(fmt).weights)
        assert bits(scale.bfloat16()) == bits(parts["weight_scale"])
        for search in ("absmax", "mse"):
            own = INT4Packed(group_size, search=search).encode(weight)
            state = {"weight": weight.float(), "weight_scale": own["weight_scale"].float()}
            made = compressor().compress(state, scheme(fmt))
            assert bits(made.pop("weight_scale").bfloat16()) == bits(own["weight_scale"])
            assert all_bits(made) == {name: bits(own[name]) for name in ("weight_packed", "weight_shape")}


def test_where_compressed_tensors_quantizes_otherwise() -> None:
    """BF16 weights: it divides in BF16, and the quotient's rounding moves codes across a boundary.

    Asymmetric: it adds the zero point before it rounds, so that ties may go the other way.
    """
    weight = make_weight((64, 1024))
    fmt = INT4Packed(search="absmax")
    parts = fmt.encode(weight)
    state = {"weight": weight, "weight_scale": parts["weight_scale"]}
    made = compressor().compress(state, scheme(fmt))["weight_packed"]
    changes = from_words(made).astype(int) - from_words(parts["weight_packed"]).astype(int)
    assert np.abs(changes).max() == 1
    assert 0 < np.count_nonzero(changes) < 0.01 * changes.size

    asymmetric = INT4Packed(32, symmetric=False, search="absmax")
    weight = torch.randint(-30, 31, (64, 1024), generator=torch.Generator().manual_seed(0)) / 2.0
    weight = weight.clamp(-7, 8)
    weight[:, ::32], weight[:, 1::32] = -7.0, 8.0  # scale 1, zero point 7, half of the weights are ties
    parts = asymmetric.encode(weight)
    grid = read_out(asymmetric, parts)
    state = {"weight": weight, "weight_scale": parts["weight_scale"].float()}
    state["weight_zero_point"] = torch.from_numpy(grid.zeros.astype(np.int8) - np.int8(8))
    made = compressor().compress(state, scheme(asymmetric))
    assert bits(made["weight_zero_point"]) == bits(parts["weight_zero_point"])
    changes = from_words(made["weight_packed"]).astype(int) - grid.codes
    assert np.abs(changes).max() == 1
    assert set(np.unique(weight.numpy()[changes != 0] % 1)) == {0.5}
