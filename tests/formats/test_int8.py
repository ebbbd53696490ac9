"""INT8 in blocks and in rows: bytes written by hand, what is refused, and compressed-tensors' own opinion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import FP8Block, INT8Block, INT8Channel, check_parts
from dsv3_tools.formats.recode import recode_into
from tests.formats.weights import all_bits, bits, empty_parts, expected_parts, expected_weight, make_weight

# Bytes.


def test_a_row_of_int8_codes_byte_by_byte() -> None:
    """Rows of largest magnitude 127, 254 and 63.5: the scales are 1, 2 and 1/2, and ties go to even codes."""
    weight = torch.tensor(
        [
            [127.0, -127.0, 0.5, 1.5, -2.5, 0.0],
            [-254.0, 253.0, 3.0, 5.0, -1.0, 1.0],
            [63.5, -63.5, 0.25, 0.75, -0.24, 16.0],
            [0.0, 0.0, -0.0, 0.0, 0.0, 0.0],
        ]
    )
    parts = INT8Channel().encode(weight)
    assert bits(parts["weight"]) == bytes.fromhex(
        """
        7f 81 00 02 fe 00
        81 7e 02 02 00 00
        7f 81 00 02 00 20
        00 00 00 00 00 00
        """
    )
    assert bits(parts["weight_scale"]) == bytes.fromhex("0000803f 00000040 0000003f 0000803f")
    assert parts["weight_scale"].shape == (4, 1)
    decoded = torch.tensor(
        [
            [127.0, -127.0, 0.0, 2.0, -2.0, 0.0],
            [-254.0, 252.0, 4.0, 4.0, 0.0, 0.0],
            [63.5, -63.5, 0.0, 1.0, 0.0, 16.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    assert bits(INT8Channel().decode(parts, dtype="F32")) == bits(decoded)


def test_blocks_of_int8_codes_byte_by_byte() -> None:
    """Blocks of 2 x 4, the right and lower ones partial."""
    fmt = INT8Block((2, 4))
    weight = torch.tensor(
        [
            [127.0, 1.0, -1.0, 2.0, 508.0, 4.0],
            [0.0, 3.0, -127.0, 64.0, -8.0, 6.0],
            [1.0, 2.0, 3.0, -31.75, 0.0, 0.0],
        ]
    )
    parts = fmt.encode(weight)
    assert bits(parts["weight"]) == bytes.fromhex(
        """
        7f 01 ff 02  7f 01
        00 03 81 40  fe 02

        04 08 0c 81  00 00
        """
    )
    assert bits(parts["weight_scale_inv"]) == bytes.fromhex("0000803f 00008040  0000803e 0000803f")
    expected = weight.clone()
    expected[1, 5] = 8.0  # 6 / 4 is 1.5, a tie, and 2 is even
    assert bits(fmt.decode(parts, dtype="F32")) == bits(expected)


def test_every_code_decodes_to_its_number() -> None:
    """-128 as well, which our own quantizer never writes: a scale is the largest magnitude / 127."""
    codes = torch.arange(-128, 128, dtype=torch.int8).reshape(1, 256)
    scale = torch.tensor([[2.0**-7]])
    weight = torch.arange(-128, 128, dtype=torch.float32).reshape(1, 256) * 2.0**-7
    decoded = INT8Channel().decode({"weight": codes, "weight_scale": scale}, dtype="F32")
    assert bits(decoded) == bits(weight)
    block = INT8Block((1, 256)).decode({"weight": codes, "weight_scale_inv": scale}, dtype="F32")
    assert bits(block) == bits(weight)
    assert int(INT8Channel().encode(make_weight((64, 4096)))["weight"].min()) == -127


def test_an_fp8_block_of_large_codes_becomes_its_codes_divided_by_four() -> None:
    """448 = 0x7E, 416, 32 = 0x60, 36, 0: all are multiples of 4, and so exact with 4 x the FP8 scale."""
    codes = torch.frombuffer(bytearray.fromhex("7e 7d 60 61  e0 e1 00 fe"), dtype=torch.uint8).reshape(2, 4)
    item = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": torch.tensor([[2.0**-10]])}
    out = empty_parts(INT8Block(), (2, 4))
    recode_into(FP8Block(), INT8Block(), [item], [out])
    assert bits(out["weight"]) == bytes.fromhex("70 68 08 09  f8 f7 00 90")
    assert bits(out["weight_scale_inv"]) == bytes.fromhex("0000803b")  # 2**-8
    assert bits(INT8Block().decode(out, dtype="F32")) == bits(FP8Block().decode(item, dtype="F32"))
    encoded = INT8Block().encode(FP8Block().decode(item, dtype="F32"))
    assert bits(encoded["weight"]) != bits(out["weight"]), "448 / 127 is no multiple of anything there"


# Shapes and parts.


def test_parts() -> None:
    assert INT8Block().parts((576, 200)) == {
        "weight": TensorSpec("I8", (576, 200)),
        "weight_scale_inv": TensorSpec("F32", (5, 2)),
    }
    assert INT8Channel().parts((576, 200)) == {
        "weight": TensorSpec("I8", (576, 200)),
        "weight_scale": TensorSpec("F32", (576, 1)),
    }
    assert (INT8Block().row_alignment, INT8Block((64, 32)).row_alignment) == (128, 64)
    assert INT8Channel().row_alignment == 1


def test_blocks_of_another_size() -> None:
    weight, fmt = make_weight((130, 70)), INT8Block((64, 32))
    parts = fmt.encode(weight)
    assert parts["weight_scale_inv"].shape == (3, 3)
    assert all_bits(parts) == all_bits(expected_parts(fmt, weight))
    assert bits(fmt.decode(parts)) == bits(expected_weight(fmt, parts, torch.bfloat16))


def wrong_parts() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Parts of no INT8 weight; the scales' part is called SCALE here."""
    codes = torch.zeros((300, 200), dtype=torch.int8)
    scale = torch.ones((3, 2))
    return {
        "nothing": ({}, "no part 'weight'"),
        "missing scale": ({"weight": codes}, r"got the parts \['weight'\]"),
        "extra part": ({"weight": codes, "SCALE": scale, "bias": scale}, "got the parts"),
        "misnamed scale": ({"weight": codes, "scale": scale}, "got the parts"),
        "zero points": ({"weight": codes, "SCALE": scale, "weight_zero_point": codes}, "got the parts"),
        "broadcastable": ({"weight": codes, "SCALE": scale[:1, :1]}, r"float32 \[1, 1\], expected F32 \["),
        "one scale": ({"weight": codes, "SCALE": scale[0, 0]}, r"\[\], expected F32 \["),
        "flat": ({"weight": codes, "SCALE": torch.ones(300)}, r"\[300\], expected F32 \["),
        "transposed": ({"weight": codes, "SCALE": scale.t()}, r"\[2, 3\], expected F32 \["),
        "float64": ({"weight": codes, "SCALE": scale.double()}, "torch.float64 .*, expected F32"),
        "bytes": ({"weight": codes.view(torch.uint8), "SCALE": scale}, "weight is torch.uint8 .*expected I8"),
        "int16": ({"weight": codes.short(), "SCALE": scale}, "weight is torch.int16"),
        "FP8": ({"weight": codes.view(torch.float8_e4m3fn), "SCALE": scale}, "float8_e4m3fn"),
        "vector": ({"weight": codes[0], "SCALE": scale}, "expected two dimensions"),
        "experts in one": ({"weight": codes[None], "SCALE": scale}, "expected two dimensions"),
    }


WRONG_PARTS = wrong_parts()


@pytest.mark.parametrize("case", WRONG_PARTS)
@pytest.mark.parametrize("fmt", [INT8Block(), INT8Channel()], ids=lambda fmt: fmt.name)
def test_wrong_parts(fmt: INT8Block | INT8Channel, case: str) -> None:
    wrong, expected = WRONG_PARTS[case]
    parts = {(fmt.scale_part if name == "SCALE" else name): part for name, part in wrong.items()}
    for refuse in (lambda: check_parts(fmt, parts), lambda: fmt.decode(parts)):
        with pytest.raises(FormatError, match=expected) as caught:
            refuse()
        assert str(caught.value).startswith(f"{fmt.name}: ")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_scales_of_rows_in_other_dtypes_are_read(dtype: str) -> None:
    weight = make_weight((40, 72))
    written = INT8Channel().encode(weight)
    parts = written | {"weight_scale": written["weight_scale"].to(torch_dtype(dtype))}
    specs = {"weight": TensorSpec("I8", (40, 72)), "weight_scale": TensorSpec(dtype, (40, 1))}
    fmt = INT8Channel().fitted(specs)
    assert fmt == INT8Channel(scale_dtype=dtype)
    assert fmt.parts((40, 72)) == specs
    exact = parts["weight"].double() * parts["weight_scale"].double()
    assert bits(fmt.decode(parts, dtype="F32")) == bits(exact.float())
    assert bits(fmt.decode(parts)) == bits(exact.float().bfloat16())
    if dtype != "F32":
        with pytest.raises(FormatError, match=f"int8_channel: {dtype} scales are only read"):
            fmt.encode(weight)


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "I32"])
def test_scales_that_are_none_do_not_fit(dtype: str) -> None:
    specs = {"weight": TensorSpec("I8", (40, 72)), "weight_scale": TensorSpec(dtype, (40, 1))}
    assert INT8Channel().fitted(specs) == INT8Channel()
    assert INT8Channel().fitted({}) == INT8Channel()
    assert INT8Block().fitted(specs) == INT8Block()


# Configurations of blocks; those of rows are compressed-tensors'.


def test_the_configuration_of_blocks() -> None:
    config = INT8Block().quantization_config()
    assert config == {
        "activation_scheme": "dynamic",
        "quant_method": "blockwise_int8",
        "weight_block_size": [128, 128],
    }
    assert INT8Block.from_quantization_config(config, "x") == INT8Block()
    other = INT8Block((64, 32))
    assert INT8Block.from_quantization_config(other.quantization_config(), "x") == other


@pytest.mark.parametrize("size", [None, 128, [128], [128, 0], [100, 128], [128.0, 128], "128"], ids=str)
def test_configurations_without_a_block_size(size: Any) -> None:
    config = INT8Block().quantization_config() | {"weight_block_size": size}
    with pytest.raises(FormatError, match=r"^config\.json: weight_block_size is ") as caught:
        INT8Block.from_quantization_config(config, "config.json")
    assert str(caught.value).isprintable()


def test_equal_parameters_equal_format() -> None:
    assert INT8Block() == INT8Block((128, 128))
    assert INT8Channel() == INT8Channel("F32")
    assert len({INT8Block(), INT8Block((64, 128)), INT8Channel(), INT8Channel("BF16")}) == 4
    assert INT8Block().same_bytes(INT8Block())
    assert not INT8Block().same_bytes(INT8Channel())
    assert not INT8Channel().same_bytes(INT8Channel("BF16"))


# compressed-tensors.


def channel_scheme() -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    return quantization.QuantizationScheme(targets=["Linear"], weights=arguments)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_compressed_tensors_decodes_rows_alike(dtype: str) -> None:
    """It multiplies in the dtype of the scales, where ours rounds the float32 product: the same number."""
    naive = pytest.importorskip("compressed_tensors.compressors.naive_quantized")
    parts = INT8Channel().encode(make_weight((64, 200), torch.float32))
    parts["weight"][0] = torch.arange(-128, 72, dtype=torch.int8)
    parts["weight_scale"] = parts["weight_scale"].to(torch_dtype(dtype))
    decoded = naive.IntQuantizationCompressor.decompress(parts, channel_scheme())["weight"]
    assert decoded.dtype == torch_dtype(dtype)
    own = INT8Channel(dtype).decode(parts, dtype="F32")
    assert bits(own.to(torch_dtype(dtype))) == bits(decoded)
    parts["weight"][5, 7] += 1
    assert bits(INT8Channel(dtype).decode(parts, dtype="F32").to(torch_dtype(dtype))) != bits(decoded)


def test_compressed_tensors_chooses_the_same_codes_for_the_same_scales() -> None:
    """In float32; in BF16 it divides in BF16. Its own scales are others: largest / 127.5 instead of / 127."""
    naive = pytest.importorskip("compressed_tensors.compressors.naive_quantized")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    weight = make_weight((64, 200), torch.float32)
    parts, scheme = INT8Channel().encode(weight), channel_scheme()
    state = {"weight": weight, "weight_scale": parts["weight_scale"]}
    assert all_bits(naive.IntQuantizationCompressor.compress(state, scheme)) == all_bits(parts)
    least, most = weight.aminmax(dim=1, keepdim=True)
    scale, _ = helpers.calculate_qparams(least, most, scheme.weights)
    ratio = (parts["weight_scale"].double() / scale.double() - 127.5 / 127).abs()
    assert (ratio <= 2.0**-22).all()
