"""What every registered format promises; a format is covered by being in `FORMATS`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import FORMATS, INT4, INT4AWQ, INT4GPTQ, Dense, FP8Block, check_parts
from dsv3_tools.formats.base import Format
from dsv3_tools.formats.integer import IntegerFormat
from dsv3_tools.formats.recode import recode_into
from tests.formats.weights import (
    all_bits,
    bits,
    can_store,
    empty_parts,
    expected_parts,
    expected_weight,
    make_weight,
    read_out,
    spread_scale,
)

REDUCED = PRESETS["deepseek-v3"] | {
    "hidden_size": 7168 // 16,
    "intermediate_size": 18432 // 16,
    "kv_lora_rank": 512 // 16,
    "moe_intermediate_size": 2048 // 16,
    "n_routed_experts": 16,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "q_lora_rank": 1536 // 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 130,
}
"""DeepSeek-V3 with every width a sixteenth, the heads of attention fewer."""

SHAPES = sorted(
    {spec.shape for spec in dense_tensors(ModelConfig.from_dict(REDUCED)).values() if len(spec.shape) == 2}
    | {
        (1, 1),
        (1, 128),
        (128, 1),
        (127, 129),
        (129, 127),
        (128, 128),
        (256, 384),
        (576, 130),
        (5, 300),
        (300, 5),
    }
    | {(8, 8), (8, 32), (7, 256), (24, 64), (136, 384), (8, 1152), (9, 128), (8, 100), (12, 64)}
)
STORED = [(name, shape) for name, fmt in FORMATS.items() for shape in SHAPES if can_store(fmt, shape)]
REFUSED = [(name, shape) for name, fmt in FORMATS.items() for shape in SHAPES if not can_store(fmt, shape)]
"""INT4 groups must divide columns; words of codes or zero points along rows must divide rows."""

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
every_stored_shape = pytest.mark.parametrize(("name", "shape"), STORED, ids=str)


def error_bound(fmt: Format, weight: Tensor, parts: dict[str, Tensor], *, tightness: float = 1.0) -> Tensor:
    """Returns how far decode(encode(weight)), in float32, may be from a float64 `weight`.

    FP8: with q = weight / s and code = round(q), a normal code has 4 significant bits, so that
    |code - q| <= 2**-4 |q|; a subnormal one is a multiple of 2**-9, so that |code - q| <= 2**-10. Hence
    |code * s - weight| <= max(2**-4 |weight|, 2**-10 s). The quotient, the scale and the product are each
    rounded to float32, which adds at most 4 * 2**-24 |weight| (also where the clamp to 448 undoes the
    scale's).
    INT8: |q| <= 127 (1 + 2**-23), so nothing is clamped and |code - q| <= 1/2. Quotient and product are
    rounded to float32, which adds at most 2**-24 |weight| and 2**-24 (|weight| + s / 2).
    INT4: q is first moved into [-8, 7], or [-zero, 15 - zero], by what it is outside of it; the rest is
    INT8's. How far outside it may be: `test_int4.py`.
    BF16: 8 significant bits, 2**-8 |weight|, and the smallest subnormal number's half.
    """
    magnitude = weight.abs()
    if isinstance(fmt, Dense):
        return tightness * 2.0**-8 * magnitude + 2.0**-134
    scale = spread_scale(fmt, parts)
    if isinstance(fmt, FP8Block):
        return tightness * torch.maximum(2.0**-4 * magnitude, 2.0**-10 * scale) + 2.0**-22 * magnitude
    assert isinstance(fmt, IntegerFormat), f"no bound for {fmt.name}"
    steps = torch.full_like(weight, 0.5)
    if isinstance(fmt, INT4):
        grid = read_out(fmt, parts)
        zeros = torch.from_numpy(grid.zeros.astype(float))
        zeros = zeros.repeat_interleave(weight.shape[1] // zeros.shape[1], 1)
        quotient = weight / scale
        steps = torch.maximum(steps, torch.maximum(quotient - (15 - zeros), -zeros - quotient))
    return tightness * steps * scale + 2.0**-22 * (magnitude + scale)


@every_stored_shape
def test_encoded_parts_have_the_promised_specs(name: str, shape: tuple[int, ...]) -> None:
    fmt = FORMATS[name]
    promised = fmt.parts(shape)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        parts = fmt.encode(make_weight(shape, dtype))
        assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == {
            part: (spec.shape, torch_dtype(spec.dtype)) for part, spec in promised.items()
        }
        assert all(t.is_contiguous() for t in parts.values())
        assert sum(t.nbytes for t in parts.values()) == sum(spec.nbytes for spec in promised.values())
    assert check_parts(fmt, parts) == shape
    assert tuple(promised) == fmt.part_names
    assert fmt.weight_part in promised
    assert promised[fmt.weight_part].dtype == fmt.code_dtype
    assert fmt.shape_of(promised[fmt.weight_part].shape) == shape
    assert fmt.scale_part in (None, *promised)
    assert fmt.fitted(promised) == fmt


@pytest.mark.parametrize(("name", "shape"), REFUSED, ids=str)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    fmt = FORMATS[name]
    for refuse in (fmt.parts, lambda shape: fmt.encode(make_weight(shape))):
        with pytest.raises(FormatError, match=r"expected columns in multiples of") as caught:
            refuse(shape)
        assert str(caught.value).startswith(f"{fmt.name}: got a weight of shape {list(shape)}, ")
        assert str(caught.value).isprintable()


def test_control_which_formats_refuse_which_shapes() -> None:
    assert {name for name, _ in REFUSED} == {name for name, fmt in FORMATS.items() if isinstance(fmt, INT4)}
    assert {name for name, _ in STORED} == set(FORMATS)
    assert ("int4_packed", (7, 256)) in STORED
    assert ("int4_packed_g32_asymmetric", (7, 256)) in REFUSED
    assert ("int4_packed_g32_asymmetric", (8, 32)) in STORED
    assert ("int4_packed_g64_absmax", (8, 32)) in REFUSED
    assert ("int4_gptq", (7, 256)) in REFUSED
    assert ("int4_awq", (7, 256)) in REFUSED


@every_format
@pytest.mark.parametrize("shape", [(), (128,), (2, 128, 128), (0, 128), (128, 0)], ids=str)
def test_all_but_dense_ones_store_matrices_only(fmt: Format, shape: tuple[int, ...]) -> None:
    if isinstance(fmt, Dense):
        assert fmt.parts(shape)["weight"].shape == shape
        return
    for refuse in (fmt.parts, lambda shape: fmt.encode(torch.zeros(shape))):
        with pytest.raises(FormatError, match="expected two dimensions, none of them 0") as caught:
            refuse(shape)
        assert str(caught.value).startswith(f"{fmt.name}: got a weight of shape {list(shape)}")


@every_stored_shape
def test_the_bits_are_those_of_the_reference(name: str, shape: tuple[int, ...]) -> None:
    fmt = FORMATS[name]
    large = isinstance(fmt, INT4) and shape[0] * shape[1] > 1 << 17  # the reference's search takes a second
    for dtype in (torch.bfloat16,) if large else (torch.bfloat16, torch.float32):
        weight = make_weight(shape, dtype)
        parts = fmt.encode(weight)
        assert all_bits(parts) == all_bits(expected_parts(fmt, weight))
        for target, out in (("BF16", torch.bfloat16), ("F32", torch.float32)):
            assert bits(fmt.decode(parts, dtype=target)) == bits(expected_weight(fmt, parts, out))
    assert bits(fmt.decode(parts)) == bits(fmt.decode(parts, dtype="BF16"))


@every_stored_shape
def test_decoding_what_was_encoded_stays_within_the_bound(name: str, shape: tuple[int, ...]) -> None:
    fmt = FORMATS[name]
    weight = make_weight(shape, torch.float32)
    parts = fmt.encode(weight)
    error = (fmt.decode(parts, dtype="F32").double() - weight.double()).abs()
    assert (error <= error_bound(fmt, weight.double(), parts)).all()


@every_format
def test_control_the_bound_is_tight_and_finds_swapped_rows(fmt: Format) -> None:
    weight = make_weight((576, 384), torch.float32)
    parts = fmt.encode(weight)
    error = (fmt.decode(parts, dtype="F32").double() - weight.double()).abs()
    assert (error > error_bound(fmt, weight.double(), parts, tightness=0.9)).any()
    scrambled = {part: tensor.flip(0).contiguous() for part, tensor in parts.items()}
    error = (fmt.decode(scrambled, dtype="F32").double() - weight.double()).abs()
    assert not (error <= error_bound(fmt, weight.double(), scrambled)).all()


@every_format
def test_encoding_again_what_was_decoded_changes_nothing_more(fmt: Format) -> None:
    parts = fmt.encode(make_weight((304, 384)))
    if isinstance(fmt, INT4):
        pytest.skip("codes do not tell their scale: 7 / 7.5 of it fits, too; next test")
    weight = fmt.decode(parts, dtype="F32")
    once = fmt.decode(fmt.encode(weight), dtype="F32")
    assert torch.equal(fmt.decode(fmt.encode(once), dtype="F32"), once)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if isinstance(fmt, INT4)])
def test_int4_codes_are_moved_not_chosen_again(name: str) -> None:
    fmt = FORMATS[name]
    parts = fmt.encode(make_weight((304, 384)))
    outs = empty_parts(fmt, (304, 384))
    assert recode_into(fmt, fmt, [parts], [outs]).tolist() == [0]
    moved = {part for part in parts if part not in fmt.fixed((304, 384))}
    assert {part: bits(outs[part]) for part in moved} == {part: bits(parts[part]) for part in moved}


def test_control_chosen_again_int4_codes_would_be_others() -> None:
    fmt = FORMATS["int4_packed_g64_absmax"]
    parts = fmt.encode(make_weight((304, 384)))
    again = fmt.encode(fmt.decode(parts, dtype="F32"))
    assert bits(again["weight_packed"]) != bits(parts["weight_packed"])


@every_format
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -448.0, 2.0**-100, 3 * 2.0**20])
def test_constant_weights(fmt: Format, value: float) -> None:
    """Exact, but for the sign of an integer's zero and for INT4, whose largest code is no 7.5."""
    weight = torch.full((136, 384), value, dtype=torch.bfloat16)
    parts = fmt.encode(weight)
    decoded = fmt.decode(parts)
    if isinstance(fmt, INT4) and value:
        error = (fmt.decode(parts, dtype="F32").double() - value).abs()
        assert (error <= error_bound(fmt, weight.double(), parts)).all()
        assert (error <= abs(value) / 15).all()
    elif isinstance(fmt, IntegerFormat):
        assert bits(decoded) == bits(weight + 0.0)
    else:
        assert bits(decoded) == bits(weight)


@every_format
def test_what_is_not_finite_is_counted(fmt: Format) -> None:
    """An integer has no NaN: what is not finite is counted where it is read, and stored as zero."""
    weights = [make_weight((136, 384), seed=seed) for seed in range(3)]
    weights[1][3, 4] = torch.nan
    weights[1][129, 139] = torch.inf
    weights[2][0, 0] = -torch.inf
    outs = [empty_parts(fmt, (136, 384)) for _ in weights]
    counts = fmt.encode_into(weights, outs)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [0, 2, 1]
    decoded = [torch.empty((136, 384), dtype=torch.bfloat16) for _ in weights]
    kept = [0, 0, 0] if isinstance(fmt, IntegerFormat) else [0, 2, 1]
    assert fmt.decode_into(outs, decoded).tolist() == kept
    assert [int((~torch.isfinite(weight)).sum()) for weight in decoded] == kept
    if isinstance(fmt, IntegerFormat):
        assert [decoded[1][3, 4], decoded[1][129, 139], decoded[2][0, 0]] == [0, 0, 0]
        without = [torch.where(torch.isfinite(weight), weight, 0) for weight in weights]
        for weight, out in zip(without, outs, strict=True):
            clean = fmt.encode(weight)
            assert all(bits(out[part]) == bits(clean[part]) for part in coded(fmt, weight))


def coded(fmt: Format, weight: Tensor) -> list[str]:
    """Returns the parts that encoding writes."""
    shape = tuple(weight.shape)
    return [part for part in fmt.parts(shape) if part not in fmt.fixed(shape)]


@every_format
def test_a_group_is_coded_as_each_weight_alone(fmt: Format) -> None:
    shapes = [(130, 140), (1, 5), (136, 256), (8, 128), (256, 128)]
    weights = [make_weight(shape) for shape in shapes if can_store(fmt, shape)]
    assert len(weights) >= 3
    outs = [empty_parts(fmt, tuple(weight.shape)) for weight in weights]
    fmt.encode_into(weights, outs)
    for weight, out in zip(weights, outs, strict=True):
        alone = fmt.encode(weight)
        assert {p: bits(out[p]) for p in coded(fmt, weight)} == {
            p: bits(alone[p]) for p in coded(fmt, weight)
        }
    together = [torch.empty(weight.shape, dtype=torch.float32) for weight in weights]
    assert fmt.decode_into(outs, together).tolist() == [0] * len(weights)
    for out, decoded in zip(outs, together, strict=True):
        assert bits(fmt.decode(out, dtype="F32")) == bits(decoded)


@every_format
def test_encoding_leaves_alone_what_follows_from_the_shape(fmt: Format) -> None:
    shape = (136, 384)
    fixed, whole, out = fmt.fixed(shape), fmt.encode(make_weight(shape)), empty_parts(fmt, shape)
    before = all_bits(out)
    fmt.encode_into([make_weight(shape)], [out])
    assert {part for part in out if bits(out[part]) == before[part]} == set(fixed)
    assert {part: bits(whole[part]) for part in fixed} == fixed
    assert fmt.weight_part not in fixed
    assert fmt.scale_part not in fixed
    for part in fixed:
        out[part].fill_(-1)
        assert bits(fmt.decode(out)) == bits(fmt.decode(whole))


@every_format
def test_stripes_at_the_row_alignment_are_coded_alone(fmt: Format) -> None:
    assert (fmt.row_alignment is None) == isinstance(fmt, (INT4GPTQ, INT4AWQ))
    if fmt.row_alignment is None:
        pytest.skip("stored column by column: never divided")
    weight = make_weight((304, 384))
    whole = fmt.encode(weight)
    rows = fmt.row_alignment * -(-100 // fmt.row_alignment)
    top, bottom = fmt.encode(weight[:rows]), fmt.encode(weight[rows:])
    for part in coded(fmt, weight):
        assert bits(whole[part]) == bits(top[part]) + bits(bottom[part])
    decoded = [fmt.decode(stripe, dtype="F32") for stripe in (top, bottom)]
    assert bits(torch.cat(decoded)) == bits(fmt.decode(whole, dtype="F32"))


@every_format
def test_encoding_does_not_change_its_argument(fmt: Format) -> None:
    weight = make_weight((384, 136)).t()
    before = weight.clone()
    parts = fmt.encode(weight)
    assert torch.equal(weight, before)
    assert all_bits(parts) == all_bits(fmt.encode(weight.contiguous()))
    kept = all_bits(parts)
    fmt.decode(parts)
    assert all_bits(parts) == kept


@every_format
def test_parts_that_are_not_contiguous_are_refused_or_read_right(fmt: Format) -> None:
    parts = fmt.encode(make_weight((136, 384)))
    expected = bits(fmt.decode(parts))
    for part, tensor in parts.items():
        strided = torch.stack([tensor, tensor], -1)[..., 0]
        assert not strided.is_contiguous()
        found = decode_or_message(fmt, {**parts, part: strided})
        assert found == expected or "expected contiguous" in str(found)


def decode_or_message(fmt: Format, parts: dict[str, Tensor]) -> bytes | str:
    try:
        return bits(fmt.decode(parts))
    except FormatError as error:
        return str(error)
